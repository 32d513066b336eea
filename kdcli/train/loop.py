"""The loop: collect a step's micro-batches, count globally, forward and backward each, update; tell, save."""

from __future__ import annotations

import logging
import math
import shlex
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from kdcli.api import Batch, DomainScheduler, Engine, Evaluator, Reporter, Rollout, Student
from kdcli.errors import ConfigError, Interrupted, NumericsError
from kdcli.store import status
from kdcli.store.fault import fault
from kdcli.store.metrics import MetricsLog
from kdcli.train import checkpoint
from kdcli.train.distiller import Distiller
from kdcli.train.export import export
from kdcli.train.interrupt import Interrupt
from kdcli.train.loader import Loader
from kdcli.train.scorer import Scorer, StopScoring

log = logging.getLogger(__name__)

T = TypeVar("T")


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

    distiller: Distiller
    engine: Engine
    loader: Loader
    rollout: Rollout
    domain_scheduler: DomainScheduler
    evaluations: Mapping[str, Evaluator] = field(default_factory=dict)
    reporters: Sequence[Reporter] = ()  # rank 0 only
    interrupt: Interrupt = field(default_factory=Interrupt)
    config: Mapping[str, Any] = field(default_factory=dict)  # for reporters and the model card
    note: Mapping[str, Any] = field(default_factory=dict)  # for COMMIT.json

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


def train(run: Run) -> Path:
    """Train to the end and export; returns the student's folder.

    Raises Interrupted after saving, NumericsError before a bad update, KDError for what a user can mend.
    """
    here = _begin(run)
    while True:
        try:
            _tell(run, here)
        except StopScoring as stop:
            _interrupt(run, here, stop.signal_number)
        if here.step >= run.steps or here.out_of_time:
            break
        if run.save_every and here.step % run.save_every == 0 and here.step > max(0, here.saved):
            _save(run, here)
        stop = _advance(run, here)
        if stop:
            _interrupt(run, here, stop)
    if here.step > here.saved:
        _save(run, here)
    student = export(run.distiller, run.engine, run.dir, run.config, run.evaluations)
    _report_status(run, here, "done", exit_code=0)
    return student


# --------------------------------------------------------------------------------------------------------- one step


def _advance(run: Run, here: Position) -> int:
    """One optimizer step; returns the signal that asks to stop, the same on every rank, or 0."""
    engine, step, began = run.engine, here.step + 1, time.monotonic()
    batches = [run.rollout(b.to(engine.device), run.student, step) for b in run.loader.next(step)]
    counts = engine.sum(_total(run.distiller.count(batch) for batch in batches))
    if not counts["tokens"]:
        raise ConfigError(f"step {step}: none of the {run.loader.batch_size} rows has a supervised token; look at data")
    shares = []
    for batch in batches:
        loss, metrics = engine(batch, counts=counts)
        if fault("step.forward", step=step):
            loss, metrics = loss * math.nan, {**metrics, "loss/total": math.nan}
        engine.backward(loss, last=batch is batches[-1])
        fault("step.backward", step=step)
        shares.append(metrics)
    totals = engine.sum({**_total(shares), **_flags(run, here, began)})
    flags = {name: totals.pop(name) for name in list(totals) if name.startswith("flag/")}
    lr = engine.lr
    if not all(math.isfinite(value) for value in totals.values()):
        raise _breakdown(run, step, lr, totals, batches, shares)
    try:
        fault("step.optim", step=step)
        norm = engine.step()
    except NumericsError as error:
        raise NumericsError(f"step {step} at lr {lr:g}: {error}; {_way_out(run)}") from error
    seconds = time.monotonic() - began
    here.step, here.tokens, here.seconds = step, here.tokens + counts["tokens"], here.seconds + seconds
    here.out_of_time = bool(flags["flag/time"])
    weights = run.loader.weights
    here.line = {
        **totals,
        "lr": lr,
        "grad_norm": norm,
        "tokens": here.tokens,
        "tokens_per_second": counts["tokens"] / seconds,
        **({f"domain/{name}/weight": weight for name, weight in weights.items()} if len(weights) > 1 else {}),
    }
    return int(max((number for number in (2, 15) if flags[f"flag/signal/{number}"]), default=0))


def _total(parts: Any) -> dict[str, float]:
    total: Counter[str] = Counter()
    for part in parts:
        total.update(part)
    return dict(total)


def _flags(run: Run, here: Position, began: float) -> dict[str, float]:
    """What this rank wants all to agree on; rank 0 keeps the time."""
    limit = math.inf if run.minutes is None or run.engine.rank else run.minutes * 60
    late = here.seconds + time.monotonic() - began >= limit
    wanted = {f"flag/signal/{number}": float(run.interrupt.received == number) for number in (2, 15)}
    return {"flag/time": float(late), **wanted}


def _breakdown(
    run: Run,
    step: int,
    lr: float,
    totals: Mapping[str, float],
    batches: Sequence[Batch],
    shares: Sequence[Mapping[str, float]],
) -> NumericsError:
    """A collective: every rank names its bad rows."""
    mine = [
        row
        for batch, share in zip(batches, shares, strict=True)
        if not all(map(math.isfinite, share.values()))
        for row in batch.row
    ]
    rows = [row for part in run.engine.gather(mine) for row in part]
    bad = ", ".join(f"{name} is {value}" for name, value in totals.items() if not math.isfinite(value))
    return NumericsError(f"step {step} at lr {lr:g}: {bad} (examples {', '.join(rows[:8])}); {_way_out(run)}")


def _way_out(run: Run) -> str:
    kept = "the last checkpoint is untouched" if any(run.checkpoints.glob("step-*")) else "nothing was saved"
    return f"no parameter was changed by it and {kept}; lower optimizer.lr, or look at these examples"


# -------------------------------------------------------------------------------------------------- begin and resume


def _begin(run: Run) -> Position:
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
        run.domain_scheduler.load_state_dict(saved["domain_scheduler"])
    if first:
        MetricsLog(run.dir).cut(here.step if here.line is None else here.step - 1)
        checkpoint.abandon_after(run.checkpoints, here.step if found else -1)
        info = {"dir": run.dir, "name": run.name, "steps": run.steps, "step": here.step, "config": run.config}
        run.reporters = [r for r in run.reporters if _survives(r, lambda r: r.start(info))]
    _report_status(run, here, "running")
    return here


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


# ------------------------------------------------------------------------------------------------------ tell and save


def _tell(run: Run, here: Position) -> None:
    """Evaluate if it is time to, and write the step's line; once per step, also when interrupted in between."""
    if here.line is None:
        return
    last = here.step >= run.steps or here.out_of_time
    periodic = run.eval_every and here.step % run.eval_every == 0
    line = dict(here.line)
    if here.step == 0 or last or periodic:
        began = time.monotonic()
        line |= _evaluate(run, here.step)
        here.seconds += time.monotonic() - began
    if line and (last or here.step % run.log_every == 0 or len(line) > len(here.line)) and run.engine.rank == 0:
        MetricsLog(run.dir).append(here.step, line)
        run.reporters = [r for r in run.reporters if _survives(r, lambda r: r.log(here.step, line))]
    here.line = None


def _evaluate(run: Run, step: int) -> dict[str, float]:
    """All evaluations. Raises StopScoring, on every rank, when a signal came."""
    metrics: dict[str, float] = {}
    run.distiller.eval()
    try:
        scorer = Scorer(run.engine, run.student.tokenizer, run.interrupt)
        for name, evaluator in run.evaluations.items():
            fault("eval", step=step)
            metrics |= {f"eval/{name}/{key}": value for key, value in evaluator(scorer, step).items()}
    finally:
        run.distiller.train()
    return metrics


def _survives(reporter: Reporter, action: Callable[[Reporter], None]) -> bool:
    """A reporter that fails is left out from then on; training goes on without it."""
    try:
        action(reporter)
    except Exception as error:
        log.warning("%s failed and is switched off: %s", type(reporter).__name__, error)
        return False
    return True


def _save(run: Run, here: Position) -> None:
    began = time.monotonic()
    state = {
        "position": {"step": here.step, "tokens": here.tokens, "seconds": here.seconds, "line": here.line},
        "loader": run.loader.state_dict(),
        "rollout": run.rollout.state_dict(),
        "domain_scheduler": run.domain_scheduler.state_dict(),
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
    _report_status(run, here, "running")


def _interrupt(run: Run, here: Position, signal_number: int) -> None:
    """Save, say how to go on, and raise Interrupted on every rank."""
    if here.step > here.saved:
        _save(run, here)
    message = f"interrupted at step {here.step}, and saved; go on with: kdcli resume {shlex.quote(str(run.dir))}"
    _report_status(run, here, "interrupted", exit_code=128 + signal_number, reason=message)
    run.engine.gather(None)  # no rank leaves before rank 0 has written that down
    raise Interrupted(signal_number, message)


def _report_status(
    run: Run, here: Position, state: status.State, exit_code: int | None = None, reason: str = ""
) -> None:
    if run.engine.rank == 0:
        resumable = here.saved >= 0 and state != "done"
        status.write(
            run.dir, state, step=here.step, steps=run.steps, resumable=resumable, exit_code=exit_code, reason=reason
        )
