"""Where a run begins, and what it saves so that it can go on exactly there."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from kdcli.api import Engine
from kdcli.errors import ConfigError
from kdcli.store.metrics import MetricsLog
from kdcli.train import checkpoint
from kdcli.train.loader import same_data
from kdcli.train.run import Position, Run, report_status, tell_reporters

log = logging.getLogger(__name__)

T = TypeVar("T")


def begin(run: Run) -> Position:
    """Where to go on, everything put back; or the beginning. From here on a signal waits for a boundary."""
    first = run.engine.rank == 0
    found = _on_rank_0(run.engine, lambda: _find(run))
    run.interrupt.defer()
    here = Position()
    if first:
        checkpoint.clean(run.checkpoints)
    if found is not None:
        log.info("going on from %s (step %d)", found.path, found.step)
        saved = checkpoint.load(found, run.engine)
        here = Position(**saved["position"], began_with=found.path, saved=found.step)
        here.out_of_time = run.minutes is not None and here.seconds >= run.minutes * 60
        run.loader.load_state_dict(saved["loader"])
        run.rollout.load_state_dict(saved["rollout"])
        run.domains.load_state_dict(saved["domains"])
        run.schedules.load_state_dict(saved.get("schedules", {}))
        run.distiller.teacher.load_state_dict(saved.get("teacher", {}))
    if first:
        MetricsLog(run.dir).cut(here.step if here.line is None else here.step - 1)
        checkpoint.abandon_after(run.checkpoints, here.step if found else -1)
        info = {"dir": run.dir, "name": run.name, "steps": run.steps, "step": here.step, "config": run.config}
        tell_reporters(run, lambda reporter: reporter.start(info))
    report_status(run, here, "running")
    return here


def same_data_as_newest(checkpoints: Path, identity: Mapping[str, Any]) -> None:
    """A look at the data that the newest checkpoint is of, before anything heavy loads; `begin` looks again.

    Raises ConfigError where they are others than these (`Loader.identity`)."""
    commit = checkpoint.newest_commit(checkpoints)
    if commit is not None and "data" in commit:
        same_data(commit["data"], identity)


def save(run: Run, here: Position) -> None:
    """Commit a checkpoint of where the run is. A collective."""
    began = time.monotonic()
    state = {
        "position": {"step": here.step, "tokens": here.tokens, "seconds": here.seconds, "line": here.line},
        "loader": run.loader.state_dict(),
        "rollout": run.rollout.state_dict(),
        "domains": run.domains.state_dict(),
        "schedules": run.schedules.state_dict(),
        "teacher": run.distiller.teacher.state_dict(),
    }
    checkpoint.save(
        run.checkpoints,
        run.engine,
        step=here.step,
        state=state,
        note={"tokens": here.tokens, "data": state["loader"], **run.note},
        keep=run.keep_checkpoints,
        spare=here.began_with,
    )
    here.saved = here.step
    here.seconds += time.monotonic() - began
    report_status(run, here, "running")


def _find(run: Run) -> checkpoint.Checkpoint | None:
    """Raises ConfigError for a path without a checkpoint, or when all are damaged."""
    if run.resume == "never":
        return None
    own = run.checkpoints
    path = Path(run.resume).expanduser()
    foreign = run.resume != "auto" and own.resolve() not in path.resolve().parents
    if run.resume == "auto" or (foreign and any(own.glob("step-*"))):
        return checkpoint.find(own)
    if (path / "COMMIT.json").is_file() or path.name.startswith("step-"):
        return checkpoint.verify(path)
    found = checkpoint.find(path / "checkpoints")
    if found is None:
        raise ConfigError(f"run.resume: {path} is neither a checkpoint nor a run with one; give auto, never or a path")
    return found


def _on_rank_0(engine: Engine, action: Callable[[], T]) -> T:
    """What rank 0 finds, or raises, on every rank."""
    result: T | None = None
    problem: Exception | None = None
    if engine.rank == 0:
        try:
            result = action()
        except Exception as error:
            problem = error
    result, problem = engine.gather((result, problem))[0]
    if problem is not None:
        raise problem
    return result  # type: ignore[return-value]
