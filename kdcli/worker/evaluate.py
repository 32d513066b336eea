"""A rank of an evaluation: a student scored as training scores it, by the same engine with the same arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from kdcli.api import Evaluator, Reporter, Student, Teacher
from kdcli.config.build import build, build_terms
from kdcli.store.metrics import MetricsLog
from kdcli.store.tasks import task_of
from kdcli.text.reading import reading
from kdcli.train.distiller import Distiller
from kdcli.train.interrupt import Interrupt
from kdcli.train.scorer import Scorer
from kdcli.worker.parts import change_status, close, started


def work(run_dir: Path, config: Mapping[str, Any], interrupt: Interrupt) -> None:
    """Score, and write one line of metrics."""
    with started(config) as engine:
        teacher, student = build(config["teacher"], Teacher), build(config["student"], Student)
        evaluations = build_terms(config["evaluation"], Evaluator)
        task = task_of(student, teacher)
        told = reading(task, student.load_tokenizer(), teacher.load_tokenizer())
        teacher.place(engine)
        teacher.load(engine.device)
        student.load(engine.device)
        teacher.follow(student)
        distiller = Distiller(student, teacher, {})
        engine.prepare(
            distiller,
            optimizer=lambda groups: torch.optim.SGD(groups, lr=0.0),
            lr_schedule=lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer),
            micro_size=config["batch"]["micro_size"],
        )
        distiller.eval()
        metrics: dict[str, float] = {}
        scorer = Scorer(engine, student.tokenizer, interrupt, run_dir, told)
        for name, evaluator in evaluations.items():
            metrics |= {f"eval/{name}/{key}": value for key, value in evaluator(scorer, 0).items()}
    if engine.rank == 0:
        _record(run_dir, config, metrics)
        change_status(run_dir, "done", exit_code=0)


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
    close(reporters)
