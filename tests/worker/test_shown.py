"""The progress of an augmentation, in numbers: what is told, and what fits a narrow terminal."""

from __future__ import annotations

from typing import Any

import pytest
from rich.console import Console

from kdcli.pipeline.progress import Progress, StepOutcome
from kdcli.store.responses import Spent
from kdcli.worker.shown import Line, table


def progress(**changes: Any) -> Progress:
    facts: dict[str, Any] = {
        "step": "answer",
        "number": 1,
        "steps": 3,
        "rows_in": 400,
        "rows_expected": 400,
        "rows_out": 90,
        "aside": 10,
        "asked": 400,
        "answered": 100,
        "stored": 5,
        "failed": 2,
        "in_flight": 4,
        "seconds": 10.0,
        "spent": Spent(calls=95, failed=2, prompt_tokens=1000, completion_tokens=500, cost=0.25),
    }
    return Progress(**facts | changes)


def told(line: Line, width: int) -> str:
    console = Console(width=width, file=None, record=True, quiet=False, force_terminal=False)
    with console.capture() as captured:
        console.print(line)
    return captured.get()


def test_rows_wait_for_their_answers_though_they_are_read_ahead() -> None:
    line = Line(priced=True)
    line.update(progress(seconds=0.0, answered=0))
    line.update(progress())
    assert line.rate() == 10.0
    assert line.left() == 30.0  # 300 of 400 rows, at 10 in a second
    text = line.text()
    for fact in ("step 1/3 answer", "rows 100/400", "100 answered", "2 failed", "cost 0.25", "ETA 0:30"):
        assert fact in text
    assert text.isascii()


def test_a_rate_begins_anew_with_each_step() -> None:
    line = Line(priced=False)
    line.update(progress(seconds=0.0, answered=0))
    line.update(progress(number=2, seconds=10.0))
    assert line.rate() is None and line.left() is None
    assert "cost" not in line.text()


@pytest.mark.parametrize("width", [40, 60, 100, 160])
def test_the_line_fits_any_width(width: int) -> None:
    line = Line(priced=True)
    line.update(progress(seconds=0.0, answered=0))
    line.update(progress())
    shown = told(line, width).rstrip("\n").splitlines()
    assert len(shown) == 1 and len(shown[0]) <= width
    assert "answer" in shown[0]


def test_the_table_names_steps_reasons_and_cost() -> None:
    steps = [
        StepOutcome(
            name="answer",
            reused=False,
            rows_in=10,
            rows_out=7,
            aside={"no match": 2, "refused by the writer": 1},
            asked=10,
            stored=4,
            failed=0,
            spent=Spent(calls=6, prompt_tokens=60, completion_tokens=30, cost=1.5),
        ),
        StepOutcome(name="keep", reused=True, rows_in=7, rows_out=7),
    ]
    console = Console(width=140)
    with console.capture() as captured:
        console.print(table(steps, priced=True))
    text = captured.get()
    for cell in ("2 no match, 1 refused by the writer", "1.50", "keep (done before)"):
        assert cell in text
