"""A distillation, built, and how far it is."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdcli.api import Engine, Evaluator, Reporter, Rollout, Student
from kdcli.store import status
from kdcli.train.distiller import Distiller
from kdcli.train.domains import Domains
from kdcli.train.interrupt import Interrupt
from kdcli.train.loader import Loader
from kdcli.train.scheduling import Schedules

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Run:
    """A distillation, built: the section `run` of its config, and the objects that do the work."""

    dir: Path
    name: str = "run"
    seed: int = 0
    steps: int = 100
    minutes: float | None = None
    log_every: int = 1
    eval_every: int = 0
    save_every: int = 0
    keep_checkpoints: int = 2
    resume: str = "auto"
    export_dtype: str = "bf16"

    distiller: Distiller
    engine: Engine
    loader: Loader
    rollout: Rollout
    domains: Domains
    schedules: Schedules = field(default_factory=Schedules)
    evaluations: Mapping[str, Evaluator] = field(default_factory=dict)
    reporters: Sequence[Reporter] = ()  # rank 0 only
    interrupt: Interrupt = field(default_factory=Interrupt)
    config: Mapping[str, Any] = field(default_factory=dict)  # for reporters and the model card
    note: Mapping[str, Any] = field(default_factory=dict)  # for COMMIT.json
    reading: Mapping[str, Any] = field(default_factory=dict)  # what evaluations tell the tokenization

    @property
    def student(self) -> Student:
        return self.distiller.student

    @property
    def checkpoints(self) -> Path:
        return self.dir / "checkpoints"


@dataclass
class Position:
    """How far the run is: part of its checkpoints."""

    step: int = 0  # optimizer steps done
    tokens: float = 0.0  # supervised targets learned from
    seconds: float = 0.0  # of training, evaluating and saving, over all attempts
    line: dict[str, float] | None = field(default_factory=dict)  # metrics of `step` that have not been told yet
    out_of_time: bool = False
    began_with: Path | None = None  # the checkpoint this attempt continues
    saved: int = -1  # the step of the newest checkpoint


def tell_reporters(run: Run, action: Callable[[Reporter], None]) -> None:
    """A reporter that fails is left out from then on; training goes on without it."""
    for reporter in list(run.reporters):
        try:
            action(reporter)
        except Exception as error:
            log.warning("%s failed and is switched off: %s", type(reporter).__name__, error)
            run.reporters = [other for other in run.reporters if other is not reporter]


def report_status(
    run: Run, here: Position, state: status.State, exit_code: int | None = None, reason: str = ""
) -> None:
    """Write status.json, from rank 0."""
    if run.engine.rank == 0:
        resumable = here.saved >= 0 and state != "done"
        status.write(
            run.dir, state, step=here.step, steps=run.steps, resumable=resumable, exit_code=exit_code, reason=reason
        )
