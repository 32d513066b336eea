"""A rank of a distillation: data, models and objectives built from the config, then the loop."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

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
from kdcli.config import augmented
from kdcli.config.build import build, build_schedules, build_terms, optimizer_factory, schedule_factory
from kdcli.errors import ConfigError
from kdcli.store import atomic, blueprint
from kdcli.store.fault import fault
from kdcli.store.tasks import task_of
from kdcli.store.tokens import Row
from kdcli.text.reading import differ, reading
from kdcli.text.tokenize import encode
from kdcli.train.distiller import Distiller
from kdcli.train.domains import Domains
from kdcli.train.heldout import HeldOut, first_rows, hold_out
from kdcli.train.interrupt import Interrupt
from kdcli.train.loader import Loader
from kdcli.train.loop import train
from kdcli.train.probe import OF_TEACHER, PROBED, Probe, problem_of
from kdcli.train.resume import same_data_as_newest
from kdcli.train.run import Run
from kdcli.train.scheduling import Schedules
from kdcli.train.scorer import Scorer
from kdcli.worker.parts import close, digest, started

log = logging.getLogger(__name__)


def work(run_dir: Path, config: Mapping[str, Any], interrupt: Interrupt) -> None:
    with started(config) as engine:
        run = built(run_dir, config, engine, interrupt)
        try:
            exported = train(run)
        finally:
            close(run.reporters)
    if engine.rank == 0:
        print(f"\nstudent: {exported}\nnext:    {_next_command(run_dir, config)}", flush=True)


def built(run_dir: Path, config: Mapping[str, Any], engine: Engine, interrupt: Interrupt) -> Run:
    """Everything that a distillation needs, built from its config and loaded."""
    section, batch = config["run"], config["batch"]
    teacher, student = build(config["teacher"], Teacher), build(config["student"], Student)
    begin = build(config["student_init"], StudentInit)
    objectives = build_terms(config["objective"], Objective)
    evaluations = build_terms(config.get("evaluation"), Evaluator)
    reporters = list(build_terms(config.get("report"), Reporter).values()) if engine.rank == 0 else []
    scheduler = build(config["domain_scheduler"], DomainScheduler)

    tokenizer, other = student.prepared(begin.load_tokenizer(student, teacher)), teacher.load_tokenizer()
    task = task_of(student, teacher)
    labels = reading(task, tokenizer, other)
    foreign = other is not None and differ(tokenizer, other) and task.kind != "classification"
    if problem := problem_of(scheduler.signals, teacher, foreign=foreign):
        raise ConfigError(f"domain_scheduler: {type(scheduler).__name__} cannot work: {problem}")
    across = any(objective.cross_tokenizer for objective in objectives.values()) or scheduler.signals & OF_TEACHER
    columns = {column for objective in objectives.values() for column in objective.columns}
    fault("data.prepare", rank=engine.rank)
    told = {"columns": columns, **labels} | ({"teacher_tokenizer": other} if foreign and across else {})
    rows, held_out, content = _rows(run_dir, config, tokenizer, bool(scheduler.signals & PROBED), engine.rank, **told)
    sizes = {name: len(part) for name, part in rows.items()}
    if section.get("resume", "auto") == "auto":
        same_data_as_newest(run_dir / "checkpoints", {"rows": sizes, "content": content})
    teacher.place(engine)
    teacher.load(engine.device)
    student.load(engine.device)
    begin(student, teacher)
    student.settle()
    teacher.follow(student)
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
        content=content,
    )
    schedules = Schedules(build_schedules(config["objective"]), objectives, steps=section["steps"], epoch=loader.epoch)
    distiller = Distiller(student, teacher, objectives, foreign=foreign)
    engine.prepare(
        distiller,
        optimizer=optimizer_factory(config["optimizer"]),
        lr_schedule=schedule_factory(config["lr_schedule"]),
        micro_size=batch["micro_size"],
    )
    if engine.rank == 0:
        blueprint.keep(run_dir, student)
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
            scorer=Scorer(engine, student.tokenizer, interrupt, reading=labels),
            file=run_dir / "probe.json",
            source=digest({key: config[key] for key in ("teacher", "batch")}),
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
        note={"config": digest(config), "source": build(config["data"], Data).fingerprint()},
        reading=labels,
    )


def _rows(
    run_dir: Path, config: Mapping[str, Any], tokenizer: Any, probed: bool, rank: int, **told: Any
) -> tuple[Mapping[str, Sequence[Row]], Mapping[str, Sequence[Row]] | None, dict[str, str]]:
    """Each domain's training rows, its held-out ones if something is to be measured on them, and its content's hash."""
    batch, probe = config["batch"], config.get("probe") or {}
    lengths = {key: batch[key] for key in ("max_length", "overflow")}
    rows, counts = encode(
        build(augmented.data_of(run_dir, config), Data), tokenizer, packing=batch["packing"], **lengths, **told
    )
    log.info("data: %s", counts)
    if rank == 0:
        atomic.write_json(run_dir / "data_report.json", asdict(counts)["domains"])
    content = {name: part.content for name, part in counts.domains.items()}
    if not probed:
        return rows, None, content
    if probe.get("data") is None:
        return *hold_out(rows, probe["rows"]), content
    of_their_own, _ = encode(build(probe["data"], Data), tokenizer, **lengths, **told)
    return rows, first_rows(of_their_own, probe["rows"], list(rows)), content


def _next_command(run_dir: Path, config: Mapping[str, Any]) -> str:
    """Score the student on the held-out data of the run, or go on from its states, which have no score."""
    kind = str(config["student"]["_target_"]).split(".")[-2]
    option = f"student={kind} " if kind in ("classifier", "seq2seq") else ""
    if kind == "encoder":
        return f"kdcli distill student=classifier student.path={run_dir / 'student'} 'student.labels=[…]'"
    for name, node in (config.get("evaluation") or {}).items():
        data = (node or {}).get("data") or {}
        if name == "heldout" and data.get("path"):
            return f"kdcli evaluate {option}student.path={run_dir} evaluation.heldout.data.path={data['path']}"
    return f"kdcli evaluate {option}student.path={run_dir} evaluation.heldout.data.path=FILE.jsonl"
