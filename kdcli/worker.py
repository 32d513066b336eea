"""One rank of a run: `python -m kdcli.worker RUN_DIR`. Reads config.yaml, builds, trains or evaluates."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shlex
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import xxhash
import yaml

from kdcli.api import (
    Data,
    DomainScheduler,
    Engine,
    Evaluator,
    Objective,
    Reporter,
    Rollout,
    Student,
    StudentInit,
    Teacher,
)
from kdcli.config.build import build, build_schedules, build_terms, optimizer_factory, schedule_factory
from kdcli.config.cross import share_ids
from kdcli.errors import ConfigError, Interrupted, KDError
from kdcli.launch import _lifeline
from kdcli.store import atomic, failures, status
from kdcli.store import log as run_log
from kdcli.store.fault import fault
from kdcli.store.lock import RunLock
from kdcli.store.metrics import MetricsLog
from kdcli.store.tokens import Row
from kdcli.text.tokenize import encode
from kdcli.train import state
from kdcli.train.distiller import Distiller
from kdcli.train.domains import Domains
from kdcli.train.heldout import HeldOut, first_rows, hold_out
from kdcli.train.interrupt import Interrupt
from kdcli.train.loader import Loader
from kdcli.train.loop import train
from kdcli.train.probe import OF_TEACHER, PROBED, Probe, problem_of
from kdcli.train.run import Run
from kdcli.train.scheduling import Schedules
from kdcli.train.scorer import Scorer

log = logging.getLogger(__name__)

LOST_PEER = re.compile(
    r"connection (closed|reset)|timed out|broken pipe|socket (closed|error)|peer|NCCL|gloo", re.IGNORECASE
)


def main(run_dir: Path) -> int:
    """Do what `run_dir/config.yaml` says; returns the exit code, and leaves the reason of a failure in status.json."""
    run_dir = Path(run_dir)
    rank = int(os.environ.get("RANK", "0"))
    launched = _lifeline.VARIABLE in os.environ
    _quiet()
    with contextlib.ExitStack() as stack:
        interrupt = stack.enter_context(Interrupt())
        owner = False
        try:
            if rank == 0:
                stack.enter_context(RunLock(run_dir))
                owner = True
            run_log.setup(run_dir, rank)
            stack.callback(run_log.close)
            config = yaml.safe_load((run_dir / "config.yaml").read_text("utf-8"))
            if owner:
                _status(run_dir, "running", steps=config["run"].get("steps", 0))
            {"distill": _distill, "evaluate": _evaluate}[config["verb"]](run_dir, config, interrupt)
        except BaseException as error:
            if isinstance(error, SystemExit | GeneratorExit):
                raise
            if interrupt.received and not interrupt.deferred:
                error = Interrupted(interrupt.received)  # whatever a library has made of it
            return _failed(run_dir, rank, error, owner=owner, launched=launched)
    return 0


def _distill(run_dir: Path, config: Mapping[str, Any], interrupt: Interrupt) -> None:
    with _started(config) as engine:
        run = _built(run_dir, config, engine, interrupt)
        try:
            exported = train(run)
        finally:
            _close(run.reporters)
    if engine.rank == 0:
        print(f"\nstudent: {exported}\nnext:    {_next_command(run_dir, config)}", flush=True)


@contextlib.contextmanager
def _started(config: Mapping[str, Any]) -> Iterator[Engine]:
    """The engine, joined with the other ranks, and random numbers seeded."""
    engine = build(config["engine"], Engine)
    try:
        engine.start()
        state.seed_random(config["run"]["seed"], engine.rank)
        yield engine
    finally:
        engine.close()


def _built(run_dir: Path, config: Mapping[str, Any], engine: Engine, interrupt: Interrupt) -> Run:
    """Everything that a distillation needs, built from its config and loaded."""
    section, batch = config["run"], config["batch"]
    teacher, student = build(config["teacher"], Teacher), build(config["student"], Student)
    begin = build(config["student_init"], StudentInit)
    objectives = build_terms(config["objective"], Objective)
    evaluations = build_terms(config.get("evaluation"), Evaluator)
    reporters = list(build_terms(config.get("report"), Reporter).values()) if engine.rank == 0 else []
    scheduler = build(config["domain_scheduler"], DomainScheduler)

    tokenizer, other = student.load_tokenizer() or teacher.load_tokenizer(), teacher.load_tokenizer()
    foreign = other is not None and not share_ids(other.get_vocab(), tokenizer.get_vocab())
    if problem := problem_of(scheduler.signals, teacher, foreign=foreign):
        raise ConfigError(f"domain_scheduler: {type(scheduler).__name__} cannot work: {problem}")
    across = any(objective.cross_tokenizer for objective in objectives.values()) or scheduler.signals & OF_TEACHER
    columns = {column for objective in objectives.values() for column in objective.columns}
    fault("data.prepare", rank=engine.rank)
    told = {"columns": columns, "teacher_tokenizer": other if foreign and across else None}
    rows, held_out = _rows(run_dir, config, tokenizer, bool(scheduler.signals & PROBED), engine.rank, **told)
    teacher.load(engine.device)
    student.load(engine.device)
    begin(student, teacher)
    sizes = {name: len(part) for name, part in rows.items()}
    loader = Loader(
        rows,
        batch_size=batch["size"],
        micro_size=batch["micro_size"],
        pad_id=student.tokenizer.pad_token_id or 0,
        seed=section["seed"],
        rank=engine.rank,
        world_size=engine.world_size,
        weights=scheduler.initial(sizes),
        quota=scheduler.quota,
    )
    schedules = Schedules(build_schedules(config["objective"]), objectives, steps=section["steps"], epoch=loader.epoch)
    distiller = Distiller(student, teacher, objectives, foreign=foreign)
    engine.prepare(
        distiller,
        optimizer=optimizer_factory(config["optimizer"]),
        lr_schedule=schedule_factory(config["lr_schedule"]),
        micro_size=batch["micro_size"],
    )
    probe = None
    if held_out is not None:
        probe = Probe(
            HeldOut(
                held_out,
                micro_size=config["probe"].get("micro_size") or batch["micro_size"],
                pad_id=loader.pad_id,
                rank=engine.rank,
                world_size=engine.world_size,
            ),
            scheduler.signals,
            distiller=distiller,
            engine=engine,
            scorer=Scorer(engine, student.tokenizer, interrupt),
            file=run_dir / "probe.json",
            source=_digest({key: config[key] for key in ("teacher", "batch")}),
        )
    return Run(
        **{key: value for key, value in section.items() if key != "dir"},
        dir=run_dir,
        distiller=distiller,
        engine=engine,
        loader=loader,
        rollout=build(config["rollout"], Rollout),
        domains=Domains(scheduler, loader, objectives, probe),
        schedules=schedules,
        evaluations=evaluations,
        reporters=reporters,
        interrupt=interrupt,
        config=config,
        note={"config": _digest(config)},
    )


def _rows(
    run_dir: Path, config: Mapping[str, Any], tokenizer: Any, probed: bool, rank: int, **told: Any
) -> tuple[Mapping[str, Sequence[Row]], Mapping[str, Sequence[Row]] | None]:
    """Each domain's training rows, and its held-out ones if something is to be measured on them."""
    batch, probe = config["batch"], config.get("probe") or {}
    lengths = {key: batch[key] for key in ("max_length", "overflow")}
    rows, counts = encode(build(config["data"], Data), tokenizer, packing=batch["packing"], **lengths, **told)
    log.info("data: %s", counts)
    if rank == 0:
        atomic.write_json(run_dir / "data_report.json", asdict(counts)["domains"])
    if not probed:
        return rows, None
    if probe.get("data") is None:
        return hold_out(rows, probe["rows"])
    of_their_own, _ = encode(build(probe["data"], Data), tokenizer, **lengths, **told)
    return rows, first_rows(of_their_own, probe["rows"], list(rows))


def _evaluate(run_dir: Path, config: Mapping[str, Any], interrupt: Interrupt) -> None:
    """Score a student as training does: the same engine, the same arithmetic."""
    with _started(config) as engine:
        teacher, student = build(config["teacher"], Teacher), build(config["student"], Student)
        evaluations = build_terms(config["evaluation"], Evaluator)
        teacher.load(engine.device)
        student.load(engine.device)
        distiller = Distiller(student, teacher, {})
        engine.prepare(
            distiller,
            optimizer=lambda groups: torch.optim.SGD(groups, lr=0.0),
            lr_schedule=lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer),
            micro_size=config["batch"]["micro_size"],
        )
        distiller.eval()
        metrics: dict[str, float] = {}
        scorer = Scorer(engine, student.tokenizer, interrupt, run_dir)
        for name, evaluator in evaluations.items():
            metrics |= {f"eval/{name}/{key}": value for key, value in evaluator(scorer, 0).items()}
    if engine.rank == 0:
        _record(run_dir, config, metrics)
        _status(run_dir, "done", exit_code=0)


def _record(run_dir: Path, config: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
    """One line of metrics, at step 0."""
    reporters = list(build_terms(config.get("report"), Reporter).values())
    lines = MetricsLog(run_dir)
    lines.cut(-1)
    for reporter in reporters:
        reporter.start({"dir": run_dir, "name": config["run"]["name"], "steps": 0, "step": 0, "config": config})
    lines.append(0, metrics)
    for reporter in reporters:
        reporter.log(0, metrics)
    _close(reporters)


# ------------------------------------------------------------------------------------------------- what it has to say


def _next_command(run_dir: Path, config: Mapping[str, Any]) -> str:
    """Score the student on the held-out data of the run, or else look at its metrics."""
    for name, node in (config.get("evaluation") or {}).items():
        data = (node or {}).get("data") or {}
        if name == "heldout" and data.get("path"):
            return f"kdcli evaluate student.path={run_dir} evaluation.heldout.data.path={data['path']}"
    return f"kdcli evaluate student.path={run_dir} evaluation.heldout.data.path=FILE.jsonl"


def _close(reporters: Any) -> None:
    for reporter in reporters:
        try:
            reporter.close()
        except Exception as error:
            log.warning("%s failed at its end: %s", type(reporter).__name__, error)


def _failed(run_dir: Path, rank: int, error: BaseException, *, owner: bool, launched: bool) -> int:
    """Log, write status and word for the launcher; returns the exit code."""
    told = _in_words(run_dir, error)
    code, reason = told.exit_code, run_log.redact(str(told))
    trace = run_log.redact("".join(traceback.format_exception(error)))
    interrupted = isinstance(told, Interrupted)
    if owner or rank > 0:
        log.error("%s", reason if interrupted else f"failed: {reason}\n{trace}", extra={run_log.FILE_ONLY: True})
    if owner and status.read(run_dir).get("state") != "interrupted":
        _status(run_dir, "interrupted" if interrupted else "failed", exit_code=code, reason=reason)
    if launched and not interrupted:
        lost_peer = isinstance(told, LostPeerError)
        word = failures.Failure(rank=rank, exit_code=code, reason=reason, lost_peer=lost_peer, traceback=trace)
        failures.write(run_dir, word)
    if not launched:
        shown = f"{trace}{reason}" if os.environ.get("KDCLI_TRACEBACK") == "1" else reason
        _print_error(shown if interrupted else f"error: {shown}")
    return code


class LostPeerError(KDError):
    """Another process of the run died or hung; its own failure says why."""


def _in_words(run_dir: Path, error: BaseException) -> KDError:
    """What happened, as the user should hear it."""
    if isinstance(error, KeyboardInterrupt | Interrupted) and not str(error):
        number = error.exit_code - 128 if isinstance(error, Interrupted) else 2
        kept = "the checkpoint is as it was" if _resumable(run_dir) else "there was nothing to save yet"
        again = f"go on with: kdcli resume {shlex.quote(str(run_dir))}"
        return Interrupted(number, f"interrupted before training began, so {kept}; {again}")
    if isinstance(error, KDError):
        return error
    first_line = next(iter(str(error).splitlines()), "")
    if full := atomic.no_space(error, run_dir):
        return full
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in first_line:
        return KDError(
            f"out of memory ({first_line}); lower batch.micro_size or batch.max_length, set "
            "engine.activation_checkpointing=true, or spread the model with engine=zero3 over more processes"
        )
    if isinstance(error, RuntimeError | ConnectionError) and LOST_PEER.search(first_line) and _many():
        without_place = re.sub(r"^\[[^\]]*\]\s*", "", first_line)
        return LostPeerError(f"another process of this run died or did not answer ({without_place})")
    return KDError(f"{type(error).__name__}: {first_line}; the traceback is in {run_dir / 'kdcli.log'}")


def _print_error(text: str) -> None:
    encoding = sys.stderr.encoding or "ascii"
    print(text.encode(encoding, "replace").decode(encoding), file=sys.stderr, flush=True)


def _status(
    run_dir: Path, new: status.State, *, exit_code: int | None = None, reason: str = "", steps: int = 0
) -> None:
    """Change the state and keep the step."""
    old = status.read(run_dir)
    steps = steps or old.get("steps", 0)
    resumable = new != "done" and _resumable(run_dir)
    step = old.get("step", 0)
    with contextlib.suppress(OSError):  # a full disk must not hide what filled it
        status.write(run_dir, new, step=step, steps=steps, resumable=resumable, exit_code=exit_code, reason=reason)


def _resumable(run_dir: Path) -> bool:
    return any((run_dir / "checkpoints").glob("step-*"))


def _many() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _digest(config: Mapping[str, Any]) -> str:
    """A hash of all that a continuation may not change."""
    fixed = {key: value for key, value in config.items() if key not in ("run", "report", "evaluation", "launch")}
    return xxhash.xxh3_128_hexdigest(json.dumps(fixed, sort_keys=True).encode())


def _quiet() -> None:
    """Silence at their source what tells a user nothing."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import transformers

    transformers.logging.disable_progress_bar()


if __name__ == "__main__":
    _lifeline.follow()
    exit_code = main(Path(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    if exit_code and _many():
        os._exit(exit_code)  # leaving a broken process group in good order could wait for the others for ever
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    sys.exit(exit_code)
