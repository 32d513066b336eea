"""How far an augmentation is: a line that is drawn in place on a terminal, or written every few seconds; a table."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from kdcli.api import Reporter
from kdcli.config.build import build_terms
from kdcli.pipeline.progress import Outcome, Progress, StepOutcome
from kdcli.report._numbers import clock, money
from kdcli.report._progress import barred
from kdcli.store import metrics
from kdcli.worker.parts import close

EVERY = 5.0  # seconds between plain lines, and between lines of metrics
WINDOW = 15.0  # seconds over which a rate is measured
BAR = 10  # columns that the bar has at least


class Shown:
    """What `Pipeline.run` tells, shown and written to metrics.jsonl: counts, tokens and cost, never what was said."""

    def __init__(self, run_dir: Path, config: Mapping[str, Any], *, live: bool | None = None) -> None:
        self.console = Console(highlight=False)
        self.priced = any(
            (node or {}).get("price_prompt") or (node or {}).get("price_completion")
            for node in (config.get("writer") or {}).values()
        )
        self._line = Line(self.priced)
        self._log = metrics.MetricsLog(run_dir)
        self._number = max((line["step"] for line in metrics.read(run_dir)), default=-1)
        self._written = 0.0
        self._reporters = list(build_terms(config.get("report"), Reporter).values())
        for reporter in self._reporters:
            info = {"dir": run_dir, "name": config["run"]["name"], "steps": 0, "step": 0, "config": config}
            reporter.start(info)
        draws = self.console.is_terminal and not self.console.is_dumb_terminal
        self._bar: Live | None = None
        if live or (live is None and draws):
            self._bar = Live(self._line, console=self.console, refresh_per_second=4, transient=True)
            self._bar.start()

    def __call__(self, progress: Progress) -> None:
        """Take note of where the run stands."""
        self._line.update(progress)
        now = time.monotonic()
        due = now - self._written >= EVERY
        if self._bar is not None and progress.done:
            self.console.print(Text(self._line.ended()), soft_wrap=True)
        elif self._bar is None and (due or progress.done):
            told = self._line.ended() if progress.done else self._line.text()
            print(told, flush=True)
        if due or progress.done:
            self._written = now
            self._record(progress)

    def finished(self) -> str:
        """Which steps are done, in a sentence."""
        progress = self._line.progress
        if progress is None or progress.number == 1:
            return "no step is finished yet"
        return f"{progress.number - 1} of {progress.steps} steps are finished, {progress.step} is begun"

    def close(self) -> None:
        """Take the line off the terminal, and end the reporters."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        close(self._reporters)

    def table(self, outcome: Outcome) -> None:
        """Print what each step did."""
        self.console.print()
        self.console.print(table(outcome.steps, priced=self.priced))

    def _record(self, progress: Progress) -> None:
        self._number += 1
        spent = progress.spent
        facts = {
            "augment/step": float(progress.number),
            "augment/rows_in": float(progress.rows_in),
            "augment/rows_out": float(progress.rows_out),
            "augment/aside": float(progress.aside),
            "augment/answered": float(progress.answered),
            "augment/stored": float(progress.stored),
            "augment/failed": float(progress.failed),
            "augment/calls": float(spent.calls),
            "augment/prompt_tokens": float(spent.prompt_tokens),
            "augment/completion_tokens": float(spent.completion_tokens),
            "augment/cost": spent.cost,
            "calls_per_second": self._line.rate() or 0.0,
        }
        self._log.append(self._number, facts)
        for reporter in self._reporters:
            reporter.log(self._number, facts)


class Line:
    """The latest progress as one line. Rates are of the last `WINDOW` seconds of a step."""

    def __init__(self, priced: bool) -> None:
        self.priced = priced
        self.progress: Progress | None = None
        self._past: deque[tuple[float, float, int]] = deque()  # seconds, rows handled, questions answered

    def update(self, progress: Progress) -> None:
        if self.progress is not None and self.progress.number != progress.number:
            self._past.clear()
        self.progress = progress
        self._past.append((progress.seconds, self._handled(), progress.answered))
        while len(self._past) > 2 and progress.seconds - self._past[0][0] > WINDOW:
            self._past.popleft()

    def rate(self) -> float | None:
        """Questions answered in a second."""
        return self._per_second(2)

    def left(self) -> float | None:
        """Seconds until the step has read its rows, if it is known how many there are."""
        progress, rate = self.progress, self._per_second(1)
        if progress is None or progress.rows_expected is None or not rate:
            return None
        return max(0.0, progress.rows_expected - self._handled()) / rate

    def text(self) -> str:
        """`step 1/3 label | rows 12/40, 10 out | 12 asked ...`, in ASCII."""
        if self.progress is None:
            return "starting"
        left = self.left()
        eta = [] if left is None else [f"ETA {clock(left)}"]
        return " | ".join([self._head(), *(fact for _, fact in self._facts()), *eta])

    def ended(self) -> str:
        """The line of a step that is done."""
        progress = self.progress
        assert progress is not None
        if progress.reused:
            return f"{self._head()} | {progress.rows_out:,} rows, as they were: done before"
        return " | ".join([self._head(), *(fact for _, fact in self._facts()), "done"])

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The line with a bar."""
        progress = self.progress
        if progress is None:
            yield Text("starting")
            return
        bar = ProgressBar(
            total=progress.rows_expected,
            completed=self._handled(),
            pulse=progress.rows_expected is None,
            complete_style="cyan",
            finished_style="green",
        )
        yield barred(self._head(), self._facts(), bar, self.left(), options.max_width - BAR)

    def _head(self) -> str:
        assert self.progress is not None
        return f"step {self.progress.number}/{self.progress.steps} {self.progress.step}"

    def _facts(self) -> list[tuple[int, str]]:
        """(How dispensable it is, a fact), in reading order."""
        progress = self.progress
        assert progress is not None
        total = "" if progress.rows_expected is None else f"/{progress.rows_expected:,}"
        facts = [(1, f"rows {self._handled():,.0f}{total}"), (3, f"{progress.rows_out:,} out")]
        if progress.aside:
            facts.append((4, f"{progress.aside:,} aside"))
        if progress.asked:
            facts.append((2, f"{progress.answered:,} answered"))
            facts += [(6, f"{progress.stored:,} from the store")] if progress.stored else []
            facts += [(0, f"{progress.failed:,} failed")] if progress.failed else []
        if progress.asked and progress.spent.calls:
            facts.append((5, f"{progress.spent.tokens:,} tokens"))
            facts += [(0, f"cost {money(progress.spent.cost)}")] if self.priced else []
        rate = self.rate()
        return facts + ([(7, f"{rate:.1f}/s")] if rate and progress.asked else [])

    def _handled(self) -> float:
        """Rows read, without those whose questions wait for an answer: some hundreds are read ahead."""
        progress = self.progress
        assert progress is not None
        return progress.rows_in * progress.answered / progress.asked if progress.asked else progress.rows_in

    def _per_second(self, place: int) -> float | None:
        if len(self._past) < 2:
            return None
        first, last = self._past[0], self._past[-1]
        return (last[place] - first[place]) / (last[0] - first[0]) if last[0] > first[0] else None


def table(steps: Sequence[StepOutcome], *, priced: bool) -> Table:
    """A row per step: what went in and came out, what was set aside and why, what was asked and paid."""
    shown = Table(title="steps", title_justify="left", title_style="bold", header_style="bold")
    shown.add_column("step", overflow="fold")
    for name in ("in", "out"):
        shown.add_column(name, justify="right")
    shown.add_column("set aside", overflow="fold", ratio=1)
    for name in ("asked", "stored", "calls", "tokens", *(("cost",) if priced else ())):
        shown.add_column(name, justify="right")
    for step in steps:
        aside = ", ".join(
            f"{count:,} {reason}" for reason, count in sorted(step.aside.items(), key=lambda one: -one[1])
        )
        spent = step.spent
        failed = f" ({step.failed:,} failed)" if step.failed else ""
        numbers = [f"{step.rows_in:,}", f"{step.rows_out:,}"]
        paid = [f"{step.asked:,}{failed}", f"{step.stored:,}", f"{spent.calls:,}", f"{spent.tokens:,}"]
        paid = paid if step.asked or spent.calls else [""] * 4
        cost = [money(spent.cost) if step.asked or spent.calls else ""] if priced else []
        shown.add_row(f"{step.name}{' (done before)' if step.reused else ''}", *numbers, aside, *paid, *cost)
    return shown
