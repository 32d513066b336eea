"""The tables that a sweep ends with: a row per job, what changed, how it went, where it lies; and means over seeds."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

MOST_METRICS = 5
SEED = "run.seed"

Row = Mapping[str, Any]


def show(rows: Sequence[Row], folder: Path) -> None:
    """Print the table, the reason of each job that is not done, and means where jobs differ in their seeds."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    keys, columns = changed(rows), _columns(rows)
    table = _table(f"{len(rows)} jobs in {folder}")
    _add_columns(table, ("job",), keys, ("state",), ("step", *map(_heading, columns)), ("folder",))
    for row in rows:
        numbers = [_number(value(row, column), column) for column in columns]
        table.add_row(
            str(row["number"]),
            *_chosen(row, keys),
            row["state"],
            str(row["step"]),
            *numbers,
            Path(row["folder"]).name,
            style=None if row["state"] == "done" else "red",
        )
    console.print()
    console.print(table)
    if groups := means(rows):
        console.print("\nmean ± standard deviation over seeds", style="italic")
        console.print(_mean_table(rows, groups))
    if any(row.get("closed") for row in rows):
        console.print("closed: share of the gap to the teacher that is gone (log perplexity)", style="dim")
    for row in rows:
        if row["state"] != "done":
            console.print(
                escape(f"job {row['number']} {row['state']} (exit {row['exit_code']}): {row['reason']}"), style="red"
            )


def changed(rows: Sequence[Row]) -> list[str]:
    """The override keys whose values differ between jobs; all of them where there is one job."""
    given = [_given(row) for row in rows]
    keys = list(dict.fromkeys(key for one in given for key in one))
    return [key for key in keys if len({one.get(key) for one in given}) > 1] or (keys if len(rows) == 1 else [])


def means(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Jobs that differ in run.seed alone, as one: what was chosen, how many seeds of how many are done, and
    {column: (mean, sample standard deviation)} of those. Empty where no seed differs."""
    keys = changed(rows)
    if SEED not in keys:
        return []
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        given = _given(row)
        groups.setdefault(tuple(given.get(key, "") for key in keys if key != SEED), []).append(row)
    found = []
    for chosen, group in groups.items():
        done = [row for row in group if row["state"] == "done"]
        values = {c: [v for row in done if (v := value(row, c)) is not None] for c in _columns(rows)}
        found.append(
            {
                "chosen": dict(zip([key for key in keys if key != SEED], chosen, strict=True)),
                "done": len(done),
                "seeds": len(group),
                "values": {
                    column: (statistics.fmean(v), statistics.stdev(v) if len(v) > 1 else None)
                    for column, v in values.items()
                    if v
                },
            }
        )
    return found


def value(row: Row, column: str) -> float | None:
    """A metric of a job, or (`closed/NAME`) the share of the gap to the teacher that it closed."""
    name = column.removeprefix("closed/")
    return row["metrics"].get(column) if name == column else row.get("closed", {}).get(name)


def _mean_table(rows: Sequence[Row], groups: Sequence[Mapping[str, Any]]) -> Table:
    keys, columns = list(groups[0]["chosen"]), _columns(rows)
    table = _table()
    _add_columns(table, (), keys, (), ("seeds", *map(_heading, columns)), ())
    for group in groups:
        short = group["done"] < group["seeds"]
        numbers = [_spread(group["values"].get(column), column) for column in columns]
        table.add_row(
            *(escape(_rounded(text)) for text in group["chosen"].values()),
            f"{group['done']} of {group['seeds']}" if short else str(group["seeds"]),
            *numbers,
            style="red" if short else None,
        )
    return table


def _table(title: str | None = None) -> Table:
    return Table(title=title, title_justify="left", box=None, padding=(0, 1), header_style="bold")


def _add_columns(
    table: Table,
    number: Sequence[str],
    keys: Sequence[str],
    words: Sequence[str],
    numbers: Sequence[str],
    last: Sequence[str],
) -> None:
    for name in (*number, *map(_short, keys), *words, *numbers, *last):
        right = name in number or name in numbers
        table.add_column(escape(name), justify="right" if right else "left", overflow="fold")


def _chosen(row: Row, keys: Sequence[str]) -> list[str]:
    given = _given(row)
    return [escape(_rounded(given.get(key, ""))) for key in keys]


def _given(row: Row) -> dict[str, str]:
    return dict(one.lstrip("+").partition("=")[::2] for one in row["overrides"])


def _columns(rows: Sequence[Row]) -> list[str]:
    """The total loss, what evaluations say of all domains together, and the share of the gap that is closed."""
    names = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
    pooled = [
        n for n in names if n.startswith("eval/") and "/all/" in n and not n.endswith(("/tokens", "/teacher_ppl"))
    ]
    closed = dict.fromkeys(f"closed/{name}" for row in rows for name in row.get("closed", {}))
    return [name for name in names if name == "loss/total"] + pooled[: MOST_METRICS - 1] + list(closed)


def _short(key: str) -> str:
    """objective@objective.kd -> objective.kd."""
    return key.rpartition("@")[2]


def _heading(metric: str) -> str:
    """eval/heldout/all/ppl -> heldout ppl, since every column is of all domains together."""
    if metric.startswith("closed/"):
        return f"{metric.removeprefix('closed/')} closed"
    return metric.removeprefix("eval/").replace("/all/", " ")


def _rounded(text: str) -> str:
    """A number that a sampler drew, to four digits; anything else as it was typed."""
    try:
        return f"{float(text):.4g}" if len(text) > 8 else text
    except ValueError:
        return text


def _number(number: float | None, column: str) -> str:
    if number is None:
        return ""
    return f"{100 * number:.1f} %" if column.startswith("closed/") else f"{number:.4g}"


def _spread(found: tuple[float, float | None] | None, column: str) -> str:
    """Mean ± standard deviation, the mean to the digit after the deviation's first."""
    if found is None:
        return ""
    mean, deviation = found
    if deviation is None:
        return _number(mean, column)
    if column.startswith("closed/"):
        return f"{100 * mean:.1f} ± {100 * deviation:.1f} %"
    return f"{mean:.4g} ± {deviation:.2g}"
