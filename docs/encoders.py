"""Writes the table of docs/encoders.md from the code: `make docs`, or `python docs/encoders.py`."""

from __future__ import annotations

import sys
from pathlib import Path

import yaml

from kdcli.api import Objective, TaskKind
from kdcli.config.build import build
from kdcli.config.tasks import refusal

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/encoders.md"
COLUMNS: dict[str, TaskKind] = {
    "hf": "causal",
    "classifier": "classification",
    "seq2seq": "seq2seq",
    "encoder": "encoding",
}
BEGIN, END = "<!-- objectives: written by `make docs` -->\n", "<!-- end of objectives -->\n"


def table() -> str:
    """A line per objective: with which students it makes sense, as the check of a config says."""
    lines = ["| objective | " + " | ".join(f"`student={name}`" for name in COLUMNS) + " |", "|---" * 5 + "|"]
    for file in sorted((ROOT / "configs/objective").glob("*.yaml")):
        objective = build(yaml.safe_load(file.read_text("utf-8")), Objective)
        marks = ["yes" if refusal(objective, kind) is None else "–" for kind in COLUMNS.values()]
        lines.append(f"| `{file.stem}` | {' | '.join(marks)} |")
    return "\n".join(lines)


def page(text: str) -> str:
    """The page's text with the table as the code has it now."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin and end, f"{PAGE.name} has lost the place of its table"
    return f"{before}{begin}\n{table()}\n\n{end}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text("utf-8")), "utf-8")
    sys.exit(0)
