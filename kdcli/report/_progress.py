"""How far a run is: one line, drawn in place on a terminal or written once per logged step."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from rich.console import Console, ConsoleOptions, RenderResult
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from kdcli.report._numbers import clock, speed

SMOOTHING = 0.8  # share of the old estimate in the new one of the time per step
BAR = 12  # columns that the bar has at least


class Progress:
    """The latest logged step, and an estimate of the time left. Times are monotonic seconds."""

    def __init__(self, *, steps: int, step: int, minutes: float | None) -> None:
        self.steps = steps
        self.step = step
        self.metrics: dict[str, float] = {}
        self._seconds_per_step: float | None = None
        self._since = time.monotonic()  # the latest step or evaluation
        self._deadline = None if minutes is None else self._since + 60 * minutes

    def update(self, step: int, metrics: Mapping[str, float], *, timed: bool = True) -> None:
        """A step has been logged; not `timed` where something else took time since the one before."""
        now = time.monotonic()
        if timed and step > self.step:
            new = (now - self._since) / (step - self.step)
            old = new if self._seconds_per_step is None else self._seconds_per_step
            self._seconds_per_step = SMOOTHING * old + (1 - SMOOTHING) * new
        self.step, self.metrics, self._since = step, dict(metrics), now

    def pause(self) -> None:
        """Something other than steps has taken the time since the last one."""
        self._since = time.monotonic()

    def seconds_left(self) -> float | None:
        """Until the last step, or until run.minutes are over."""
        if self._seconds_per_step is None:
            return None
        now = time.monotonic()
        left = self._seconds_per_step * (self.steps - self.step) - (now - self._since)
        return max(0.0, left if self._deadline is None else min(left, self._deadline - now))

    def line(self) -> str:
        """`step 12/50 | loss 2.345 | ...`, in ASCII."""
        left = self.seconds_left()
        eta = [] if left is None or self.step >= self.steps else [f"ETA {clock(left)}"]
        return " | ".join([f"step {self.step}/{self.steps}", *(fact for _, fact in self._facts()), *eta])

    def _facts(self) -> list[tuple[int, str]]:
        """(How dispensable it is, a fact of the latest step), in reading order."""
        terms = {name.removeprefix("loss/"): value for name, value in self.metrics.items() if name.startswith("loss/")}
        facts = []
        if "total" in terms:
            facts.append((0, f"loss {terms.pop('total'):.3f}"))
        if len(terms) > 1:  # a single term is the loss
            facts += [(2, f"{name} {value:.3f}") for name, value in terms.items()]
        if "lr" in self.metrics:
            facts.append((3, f"lr {self.metrics['lr']:.1e}"))
        if "grad_norm" in self.metrics:
            facts.append((4, f"grad {self.metrics['grad_norm']:.2f}"))
        if "tokens_per_second" in self.metrics:
            facts.append((1, speed(self.metrics["tokens_per_second"])))
        return facts

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The line with a bar."""
        bar = ProgressBar(total=max(1, self.steps), completed=self.step, complete_style="cyan", finished_style="green")
        yield barred(f"step {self.step}/{self.steps}", self._facts(), bar, self.seconds_left(), options.max_width - BAR)


def barred(head: str, facts: Sequence[tuple[int, str]], bar: ProgressBar, left: float | None, width: int) -> Table:
    """One line: head, bar, facts and the seconds `left`. Facts for which `width`, without the bar's least, has no room
    are left out, the most dispensable first."""
    start = Text(head, style="bold")
    tail = Text("" if left is None else f" {clock(left)} left", style="cyan")
    kept, room = list(facts), width - start.cell_len - tail.cell_len - 4
    while kept and sum(len(fact) + 2 for _, fact in kept) > room:
        kept.remove(max(reversed(kept), key=lambda fact: fact[0]))
    grid = Table.grid(padding=(0, 1), expand=True)
    grid.add_column(no_wrap=True)
    grid.add_column(ratio=1)
    grid.add_column(no_wrap=True)
    grid.add_column(no_wrap=True, justify="right")
    grid.add_row(start, bar, Text("  ".join(fact for _, fact in kept)), tail)
    return grid
