"""A step at work: rows read, written, set aside and counted, and the commit that seals them."""

from __future__ import annotations

import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from kdcli.api import Example
from kdcli.errors import Interrupted
from kdcli.pipeline.commits import ASIDE, COMMIT, ROWS, Commit, Lines, Quality, aside_line, read_rows
from kdcli.pipeline.desk import Counts, RunDesk
from kdcli.pipeline.progress import Progress
from kdcli.store import atomic
from kdcli.store.examples import dump_example
from kdcli.store.fault import fault
from kdcli.store.responses import Account

if TYPE_CHECKING:
    from kdcli.pipeline.pipeline import Run

SCRATCH = "scratch"
BEAT = 0.5  # seconds between two reports


class Work:
    """One step of a run."""

    def __init__(self, run: Run, number: int, name: str, key: str, rows: int | None) -> None:
        self.run = run
        self.number = number
        self.name = name
        self.key = key
        self.expected = rows
        self.rows_in = 0
        self.asides: Counter[str] = Counter()
        self.counts = Counts()
        self.rows: Lines | None = None
        self.aside_lines: Lines | None = None

    def do(self, place: Path, source: Path | None) -> Commit:
        """Make the step's files in an empty folder."""
        run, pipeline = self.run, self.run.pipeline
        _clear(place)
        scratch = place / SCRATCH
        scratch.mkdir(parents=True, mode=0o700)
        desk = RunDesk(
            self.name,
            folder=scratch,
            seed=pipeline.seed,
            office=run.office,
            account=lambda writer: Account(run=run.id, step=self.key, writer=writer),
            aside=self.set_aside,
            tick=self.tick,
            max_failed_fraction=pipeline.max_failed_fraction,
        )
        self.counts = desk.counts
        step = pipeline.steps[self.name]
        quality = Quality()
        self.rows, self.aside_lines = Lines(place / ROWS), Lines(place / ASIDE)
        try:
            step.open(desk)
            for example in step(self._read(source)):
                self.rows.add(dump_example(example))
                quality.add(example)
                fault("augment.row", step=self.rows.count)
                self.tick()
            desk.close()
            if source is None:
                for where, reason in pipeline.data.bad_rows().items():
                    self._note("data", reason, where, "", b"{}")
            self.rows.end()
            self.aside_lines.end()
        except BaseException:
            self.rows.drop()
            self.aside_lines.drop()
            raise
        shutil.rmtree(scratch)
        atomic.fsync_folder(place)
        fault("augment.commit_step", step=self.number)
        commit = Commit(
            key=self.key,
            rows_in=self.rows_in,
            rows=self.rows.count,
            rows_hash=self.rows.hash,
            aside=dict(sorted(self.asides.items())),
            aside_hash=self.aside_lines.hash,
            asked=desk.counts.asked,
            failed=desk.counts.failed,
            forms=dict(sorted(quality.forms.items())),
            unreadable=dict(sorted(quality.unreadable.items())),
        )
        commit.write(place)
        return commit

    def set_aside(self, example: Example, reason: str, detail: str, text: str) -> None:
        self._note(self.name, reason, detail, text, dump_example(example))

    def tick(self) -> None:
        """Look whether to stop, and report now and then."""
        run = self.run
        if run.stopped():
            raise Interrupted(
                signal.SIGTERM,
                f"interrupted in augmentation.{self.name}; all answers are stored: start the same command to go on",
            )
        if time.monotonic() - run.beat >= BEAT:
            run.tell(self.progress())

    def progress(self, commit: Commit | None = None, *, reused: bool = False) -> Progress:
        run, counts = self.run, self.counts
        return Progress(
            step=self.name,
            number=self.number,
            steps=len(run.pipeline.steps),
            rows_in=commit.rows_in if commit else self.rows_in,
            rows_expected=commit.rows_in if commit else self.expected,
            rows_out=commit.rows if commit else self.rows.count if self.rows else 0,
            aside=sum((commit.aside if commit else self.asides).values()),
            asked=commit.asked if commit else counts.asked,
            answered=commit.asked if commit else counts.answered,
            stored=counts.stored,
            failed=commit.failed if commit else counts.failed,
            in_flight=run.meter.in_flight,
            spent=run.meter.spent,
            seconds=time.monotonic() - run.begun,
            done=commit is not None,
            reused=reused,
        )

    def _note(self, step: str, reason: str, detail: str, text: str, row: bytes) -> None:
        assert self.aside_lines is not None
        self.asides[reason] += 1
        self.aside_lines.add(aside_line(step, reason, detail, text, row))

    def _read(self, source: Path | None) -> Iterator[Example]:
        rows, self.expected = self.run.pipeline.seeds() if source is None else (read_rows(source), self.expected)
        for example in rows:
            self.rows_in += 1
            yield example


def _clear(place: Path) -> None:
    """An empty folder for a step; its old commit goes first."""
    if place.exists():
        (place / COMMIT).unlink(missing_ok=True)
        shutil.rmtree(place)
    place.mkdir(mode=0o700)
