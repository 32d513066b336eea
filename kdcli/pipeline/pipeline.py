"""Rows through steps: each step reads the rows of the one before and is done once, whatever stops the run."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from operator import length_hint
from pathlib import Path
from typing import Any

from kdcli.api import Data, Example, Transform, Writer
from kdcli.errors import ConfigError
from kdcli.pipeline.budget import NO_LIMIT, Budget, Meter
from kdcli.pipeline.commits import ASIDE, ROWS, Commit, hashed, join, run_id
from kdcli.pipeline.office import Office
from kdcli.pipeline.plan import Plan, Rehearsal
from kdcli.pipeline.progress import Outcome, Progress, StepOutcome
from kdcli.pipeline.work import Work
from kdcli.store import atomic
from kdcli.store.fault import fault
from kdcli.store.responses import Responses, Spent
from kdcli.store.terms import terms_of

STEPS = "steps"
PATIENCE = 30.0  # seconds that calls under way may take when a run is stopped; later ones are asked again


class Pipeline:
    """`steps` over the seeds of `data`, in `folder`; see docs/augmentation.md for its files.

    `settings` are the steps' config nodes, `answers` the file of the store, which runs may share. The result depends
    on data, steps, settings, writers and seed alone: not on concurrency, on what was stored or on how often the run
    was killed. `run` closes each writer after the last step that names it.
    """

    def __init__(
        self,
        *,
        data: Data,
        steps: Mapping[str, Transform],
        writers: Mapping[str, Writer],
        settings: Mapping[str, Mapping[str, Any]],
        folder: Path,
        answers: Path,
        seed: int = 0,
        budget: Budget = NO_LIMIT,
        max_failed_fraction: float = 0.1,
    ) -> None:
        self.data = data
        self.steps = dict(steps)
        self.writers = dict(writers)
        self.settings = settings
        self.folder = Path(folder)
        self.answers = Path(answers)
        self.seed = seed
        self.budget = budget
        self.max_failed_fraction = max_failed_fraction
        self._check()

    def run(
        self,
        *,
        stopped: Callable[[], bool] = lambda: False,
        told: Callable[[Progress], None] = lambda progress: None,
    ) -> Outcome:
        """Do the steps that are not done. Raises Interrupted soon after `stopped` says so, BudgetError when the budget
        is spent, DataError when too many calls fail, ConfigError and KDError for what a user can mend; what was
        answered is stored then, and the next run goes on from there."""
        (self.folder / STEPS).mkdir(parents=True, exist_ok=True, mode=0o700)
        return Run(self, stopped, told)()

    def plan(self, rows: int = 200) -> Plan:
        """What `run` would ask and spend, estimated from `rows` of the seeds; nobody is asked."""
        return Rehearsal(self).plan(rows)

    def key(self) -> str:
        """A hash of all that decides the result."""
        return hashed([self.content, *(self.step_facts(name) for name in self.steps)])

    @cached_property
    def content(self) -> str:
        """A hash of the seeds."""
        return self.data.fingerprint()

    def place(self, name: str) -> Path:
        """The folder of a step."""
        return self.folder / STEPS / f"{list(self.steps).index(name) + 1:02d}-{name}"

    def step_facts(self, name: str) -> Mapping[str, Any]:
        """All but its input that decides what a step makes: JSON."""
        step = self.steps[name]
        return {
            "name": name,
            "step": f"{type(step).__module__}.{type(step).__qualname__}",
            "version": step.version,
            "settings": self.settings.get(name, {}),
            "fingerprint": step.fingerprint(),
            "writers": {one: self._writer_facts[one] for one in step.writers()},
            "seed": self.seed,
        }

    @cached_property
    def _writer_facts(self) -> Mapping[str, Any]:
        """What rows depend on of each writer that is asked: what it answers, and what provenance says of it."""
        asked = {name for step in self.steps.values() for name in step.writers()}
        return {
            name: [
                writer.identity(),
                writer.batch,
                writer.endpoint,
                writer.model,
                terms_of(writer.license, writer.endpoint, writer.model, writer.terms).id,
            ]
            for name, writer in self.writers.items()
            if name in asked
        }

    def seeds(self) -> tuple[Iterator[Example], int | None]:
        """All rows to begin with, domain by domain, and how many there are if that is known."""
        domains = self.data.seeds()
        hints = [length_hint(rows, -1) for rows in domains.values()]
        known = sum(hints) if min(hints, default=-1) >= 0 else None
        return (example for rows in domains.values() for example in rows), known

    def _check(self) -> None:
        if not self.steps:
            raise ConfigError("augmentation: names no step; add one, such as +augmentation@augmentation.label=label")
        if not 0 <= self.max_failed_fraction <= 1:
            raise ConfigError(
                f"augment.max_failed_fraction: is {self.max_failed_fraction}; give a share of the calls, from 0 to 1"
            )
        problems = [
            f"augmentation.{name}: is no name for a step; use letters, digits, - and _"
            for name in self.steps
            if not re.fullmatch(r"[A-Za-z0-9_-]+", name)
        ]
        for name, step in self.steps.items():
            for writer in step.writers():
                if writer not in self.writers:
                    there = ", ".join(self.writers) or "none"
                    problems.append(
                        f"augmentation.{name}: asks the writer {writer}, and the section writer names {there}; add "
                        f"+writer@writer.{writer}=OPTION, or set augmentation.{name}.writer"
                    )
        if problems:
            raise ConfigError(*problems)


class Run:
    """One start of a pipeline."""

    def __init__(self, pipeline: Pipeline, stopped: Callable[[], bool], told: Callable[[Progress], None]) -> None:
        self.pipeline = pipeline
        self.stopped = stopped
        self.told = told
        self.begun = self.beat = time.monotonic()
        self.closed: set[str] = set()
        self.id = run_id(pipeline.folder, make=True) or ""
        self.store = Responses(pipeline.answers)
        try:
            self.meter = Meter(pipeline.budget, self.store.spent(self.id).values())
        except BaseException:
            self.store.close()
            raise
        self.office = Office(pipeline.writers, self.store, self.meter)

    def __call__(self) -> Outcome:
        pipeline = self.pipeline
        outcomes: list[StepOutcome] = []
        commit = Commit(key="")
        try:
            content, rows, source = pipeline.content, None, None
            for number, name in enumerate(pipeline.steps, start=1):
                outcome, commit = self._step(number, name, content, rows, source)
                outcomes.append(outcome)
                content, rows, source = commit.rows_hash, commit.rows, pipeline.place(name) / ROWS
                self._close_writers(number)
            return self._final(outcomes, commit)
        except OSError as error:
            raise atomic.no_space(error, pipeline.folder) or error from error
        finally:
            self.office.settle(PATIENCE)
            self._close_writers(len(pipeline.steps))
            self.store.close()

    def _step(
        self, number: int, name: str, content: str, rows: int | None, source: Path | None
    ) -> tuple[StepOutcome, Commit]:
        """Do one step, unless its files are there."""
        pipeline = self.pipeline
        place = pipeline.place(name)
        key = hashed([content, pipeline.step_facts(name)])
        state = Work(self, number, name, key, rows)
        commit = Commit.read(place, key)
        reused = commit is not None
        if commit is None:
            self.tell(state.progress())
            commit = state.do(place, source)
        spent = sum((spent for (step, _), spent in self.store.spent(self.id).items() if step == key), Spent())
        outcome = StepOutcome(
            name=name,
            reused=reused,
            rows_in=commit.rows_in,
            rows_out=commit.rows,
            aside=commit.aside,
            asked=commit.asked,
            stored=max(0, commit.asked - spent.calls),
            failed=commit.failed,
            spent=spent,
        )
        self.tell(state.progress(commit, reused=reused))
        return outcome, commit

    def _final(self, outcomes: Sequence[StepOutcome], commit: Commit) -> Outcome:
        """The result and all that was set aside, as files of the run folder."""
        pipeline = self.pipeline
        fault("augment.final")
        join([pipeline.place(name) / ASIDE for name in pipeline.steps], pipeline.folder / ASIDE)
        join([pipeline.place(outcomes[-1].name) / ROWS], pipeline.folder / ROWS)
        return Outcome(
            rows=pipeline.folder / ROWS,
            aside=pipeline.folder / ASIDE,
            steps=outcomes,
            count=commit.rows,
            forms=commit.forms,
            unreadable=commit.unreadable,
            spent=self.meter.spent,
            key=pipeline.key(),
        )

    def _close_writers(self, number: int) -> None:
        """Those that no later step names: a local model gives its memory back."""
        later = {one for step in list(self.pipeline.steps.values())[number:] for one in step.writers()}
        for name in set(self.pipeline.writers) - later - self.closed:
            self.office.staff[name].dismiss(PATIENCE)
            self.pipeline.writers[name].close()
            self.closed.add(name)

    def tell(self, progress: Progress) -> None:
        self.beat = time.monotonic()
        self.told(progress)
