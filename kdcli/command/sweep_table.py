"""The table that a sweep ends with: one row per job, what changed, how it went, where it lies."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

MOST_METRICS = 5


def show(rows: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Print the table, then the reason of each job that is not done."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    table = Table(
        title=f"{len(rows)} jobs in {folder}", title_justify="left", box=None, padding=(0, 1), header_style="bold"
    )
    keys, columns = changed(rows), _metric_columns(rows)
    headings = [_heading(column) for column in columns]
    for name in ("job", *map(_short, keys), "state", "step", *headings, "folder"):
        right = name in ("job", "step", *headings)
        table.add_column(escape(name), justify="right" if right else "left", overflow="fold")
    for row in rows:
        given = _given(row)
        numbers = [_number(row["metrics"].get(column)) for column in columns]
        style = None if row["state"] == "done" else "red"
        chosen = [escape(_rounded(given.get(key, ""))) for key in keys]
        table.add_row(
            str(row["number"]), *chosen, row["state"], str(row["step"]), *numbers, Path(row["folder"]).name, style=style
        )
    console.print()
    console.print(table)
    for row in rows:
        if row["state"] != "done":
            console.print(
                escape(f"job {row['number']} {row['state']} (exit {row['exit_code']}): {row['reason']}"), style="red"
            )


def changed(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The override keys whose values differ between jobs; all of them where there is one job."""
    given = [_given(row) for row in rows]
    keys = list(dict.fromkeys(key for one in given for key in one))
    return [key for key in keys if len({one.get(key) for one in given}) > 1] or (keys if len(rows) == 1 else [])


def _given(row: Mapping[str, Any]) -> dict[str, str]:
    return dict(one.lstrip("+").partition("=")[::2] for one in row["overrides"])


def _metric_columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The total loss, and what evaluations say of all domains together."""
    names = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
    pooled = [
        n for n in names if n.startswith("eval/") and "/all/" in n and not n.endswith(("/tokens", "/teacher_ppl"))
    ]
    return [name for name in names if name == "loss/total"] + pooled[: MOST_METRICS - 1]


def _short(key: str) -> str:
    """objective@objective.kd -> objective.kd."""
    return key.rpartition("@")[2]


def _heading(metric: str) -> str:
    """eval/heldout/all/ppl -> heldout ppl, since every column is of all domains together."""
    return metric.removeprefix("eval/").replace("/all/", " ")


def _rounded(text: str) -> str:
    """A number that a sampler drew, to four digits; anything else as it was typed."""
    try:
        return f"{float(text):.4g}" if len(text) > 8 else text
    except ValueError:
        return text


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
