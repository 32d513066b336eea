"""What a run tells while it goes on, and at its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kdcli.store.responses import Spent


@dataclass(frozen=True, kw_only=True)
class StepOutcome:
    """One step: rows and calls. `spent` is what this run folder paid for it, over all restarts; `stored` are the
    questions whose answer was there already, from equal questions, other runs or an earlier start."""

    name: str
    reused: bool  # it was finished before this start, and fits
    rows_in: int
    rows_out: int
    aside: Mapping[str, int] = field(default_factory=dict)  # reason -> rows
    asked: int = 0
    stored: int = 0
    failed: int = 0
    spent: Spent = field(default_factory=Spent)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run made. `unreadable`: reason -> rows of the result that `distill` would refuse."""

    rows: Path
    aside: Path
    steps: Sequence[StepOutcome]
    count: int  # rows of the result
    forms: Mapping[str, int]  # Example.kind -> rows
    unreadable: Mapping[str, int]
    spent: Spent  # by this run folder, over all restarts and all steps, also those that were since done anew
    key: str  # Pipeline.key()


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands: told when a step begins and ends, and about twice a second between."""

    step: str
    number: int  # 1 to `steps`
    steps: int
    rows_in: int  # read so far
    rows_expected: int | None  # that it will read, if known
    rows_out: int
    aside: int
    asked: int
    answered: int  # of those asked; some hundreds are read ahead
    stored: int
    failed: int
    in_flight: int
    spent: Spent  # of the run folder, all steps
    seconds: float  # since this start
    done: bool = False  # the step has ended
    reused: bool = False
