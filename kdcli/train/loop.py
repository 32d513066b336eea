"""The loop: collect a step's micro-batches, count globally, forward and backward each, update; tell, save."""

from __future__ import annotations

import math
import shlex
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdcli.api import Batch
from kdcli.errors import ConfigError, Interrupted, NumericsError
from kdcli.store.fault import fault
from kdcli.store.metrics import MetricsLog
from kdcli.train.export import export
from kdcli.train.resume import begin, save
from kdcli.train.run import Position, Run, report_status, tell_reporters
from kdcli.train.scorer import Scorer, StopScoring

FOR_US = ("flag", "domain")  # what ranks add up beside the step's metrics


def train(run: Run) -> Path:
    """Train to the end and export; returns the student's folder.

    Raises Interrupted after saving, NumericsError before a bad update, KDError for what a user can mend.
    """
    here = begin(run)
    while True:
        try:
            _tell(run, here)
        except StopScoring as stop:
            _interrupt(run, here, stop.signal_number)
        if here.step >= run.steps or here.out_of_time:
            break
        if run.save_every and here.step % run.save_every == 0 and here.step > max(0, here.saved):
            save(run, here)
        stop = _advance(run, here)
        if stop:
            _interrupt(run, here, stop)
    if here.step > here.saved:
        save(run, here)
    student = export(run.distiller, run.engine, run.dir, run.config, run.evaluations)
    report_status(run, here, "done", exit_code=0)
    return student


# --------------------------------------------------------------------------------------------------------- one step


def _advance(run: Run, here: Position) -> int:
    """One optimizer step; returns the signal that asks to stop, the same on every rank, or 0."""
    engine, step, began = run.engine, here.step + 1, time.monotonic()
    scheduled = run.schedules.apply(step)
    drawn = [run.rollout(b.to(engine.device), run.student, step) for b in run.domains.next(step)]
    batches, amounts = run.domains.weigh(drawn)
    counts = run.domains.fair(engine.sum(_total([*map(run.distiller.count, batches), amounts])))
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
    flags, domains = ({name: totals.pop(name) for name in list(totals) if name.startswith(f"{of}/")} for of in FOR_US)
    lr = engine.lr
    if not all(math.isfinite(value) for value in totals.values()):
        raise _breakdown(run, step, lr, totals, batches, shares)
    try:
        fault("step.optim", step=step)
        norm = engine.step()
    except NumericsError as error:
        raise NumericsError(f"step {step} at lr {lr:g}: {error}; {_way_out(run)}") from error
    run.schedules.observe(step, totals, counts)
    run.distiller.teacher.after_step(run.student, step, engine.whole)
    seconds = time.monotonic() - began
    here.step, here.tokens, here.seconds = step, here.tokens + counts["tokens"], here.seconds + seconds
    here.out_of_time = bool(flags["flag/time"])
    here.line = {
        **totals,
        "lr": lr,
        "grad_norm": norm,
        "tokens": here.tokens,
        "tokens_per_second": counts["tokens"] / seconds,
        **scheduled,
        **run.domains.observe(domains),
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


# ------------------------------------------------------------------------------------------------- tell and interrupt


def _tell(run: Run, here: Position) -> None:
    """Make new domain weights and evaluate if it is time to, and write the step's line; each once per step, also when
    interrupted in between."""
    last = here.step >= run.steps or here.out_of_time
    periodic = run.eval_every and here.step % run.eval_every == 0
    began = time.monotonic()
    if not last:
        run.domains.update(here.step)
    if here.line is None:
        return
    line = here.line | run.domains.news
    if here.step == 0 or last or periodic:
        line |= _evaluate(run, here.step)
    here.seconds += time.monotonic() - began
    if line and (last or here.step % run.log_every == 0 or len(line) > len(here.line)) and run.engine.rank == 0:
        MetricsLog(run.dir).append(here.step, line)
        tell_reporters(run, lambda reporter: reporter.log(here.step, line))
    here.line, run.domains.news = None, {}


def _evaluate(run: Run, step: int) -> dict[str, float]:
    """All evaluations. Raises StopScoring, on every rank, when a signal came."""
    metrics: dict[str, float] = {}
    run.distiller.eval()
    try:
        scorer = Scorer(run.engine, run.student.tokenizer, run.interrupt, run.dir, run.reading)
        for name, evaluator in run.evaluations.items():
            fault("eval", step=step)
            metrics |= {f"eval/{name}/{key}": value for key, value in evaluator(scorer, step).items()}
    finally:
        run.distiller.train()
    return metrics


def _interrupt(run: Run, here: Position, signal_number: int) -> None:
    """Save, say how to go on, and raise Interrupted on every rank."""
    if here.step > here.saved:
        save(run, here)
    message = f"interrupted at step {here.step}, and saved; go on with: kdcli resume {shlex.quote(str(run.dir))}"
    report_status(run, here, "interrupted", exit_code=128 + signal_number, reason=message)
    run.engine.gather(None)  # no rank leaves before rank 0 has written that down
    raise Interrupted(signal_number, message)
