"""Students and teachers that label, rewrite or encode a prompt: what makes sense with which, before weights load."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from kdcli.api import Need, Objective, Scope, Task, TaskKind, Unit
from kdcli.config import demands
from kdcli.errors import ConfigError

LAYERS = Need.HIDDEN | Need.ATTENTION | Need.RELATIONS
PLACES = Need.ATTENTION | Need.RELATIONS
NAMES: dict[TaskKind, str] = {
    "causal": "hf",
    "classification": "classifier",
    "seq2seq": "seq2seq",
    "encoding": "encoder",
}
BEGINNINGS = ("Pretrained", "FromConfig", "KeepLayers")  # that know other models than language models
SHOWN = 3  # bad rows that are named


def problems_in(config: Mapping[str, Any], objects: Mapping[str, Any]) -> list[str]:
    """One sentence per contradiction; none for causal students and teachers. Settles `student.task`."""
    from kdcli.store.tasks import task_of

    student, teacher = objects.get("student"), objects.get("teacher")
    if student is None:
        return []
    try:
        own, other = student.load_task(), None if teacher is None else teacher.load_task()
        kind: TaskKind = own.kind
        if other is not None and other.kind != kind:
            given, wanted = NAMES[other.kind], NAMES[kind]
            return [
                f"teacher: teacher={given} does not teach student={wanted}, which makes something else of a row; set "
                f"teacher={wanted}, or student={given}, or teacher=none and an objective of text such as cross_entropy"
            ]
        if kind == "causal":
            return []
        if config["verb"] == "cache":
            why = f"a cache holds what language models say, and student={NAMES[kind]} is none"
            return [f"student: {why}; distill it with the teacher itself"]
        task = task_of(student, teacher) if teacher is not None else own
    except ConfigError as error:
        return list(error.problems)
    problems = [*_refused(objects, kind), *_batch(config, kind), *_begin(config, kind), *_measured(objects, kind)]
    problems += _labels(task, other, teacher) + _tokenizers(objects, kind)
    return problems or list(_rows(objects, task))


def refusal(objective: Objective, kind: TaskKind) -> str | None:
    """Why an objective makes no sense for a task; None where it does."""
    if kind == "causal":
        return None
    if objective.cross_tokenizer:
        return "compares different tokenizers, and these models share one vocabulary" + (
            " (their labels)" if kind == "classification" else ""
        )
    needs = objective.needs
    if kind == "encoding":
        if needs & ~LAYERS or not needs & LAYERS or objective.columns:
            return "needs predictions, and an encoder has states alone"
        return None
    if needs & PLACES:
        return "compares every position with every other, which student=encoder shows (and causal models)"
    if objective.scope is Scope.STATES and objective.columns:
        return "reads states of the whole text, and these models have some where a target is predicted only"
    if kind == "classification":
        if objective.columns or objective.scope is Scope.LOGPROBS:
            return "compares whole answers, and a label is one"
        if objective.unit is not Unit.TOKEN:
            return "compares the targets of a sequence with each other, and a prompt has one label"
    return None


def suiting(kind: TaskKind, given: Need = ~Need.NOTHING) -> str:
    """Objectives for a task, as in "uld, gold or alm"."""
    return demands.named(demands.alternatives(lambda one: _suits(one, kind) and not one.needs & ~given))


def _suits(objective: type[Objective], kind: TaskKind) -> bool:
    return refusal(objective, kind) is None  # pyright: ignore[reportArgumentType]  # attributes of the class suffice


def _refused(objects: Mapping[str, Any], kind: TaskKind) -> list[str]:
    given = objects["teacher"].provides if objects.get("teacher") is not None else Need.NOTHING
    return [
        f"{where}: {type(item).__name__} {why}; choose an objective such as {suiting(kind, given)}, or drop it with "
        f"~objective@{where}"
        for where, item in objects.items()
        if where.startswith("objective.") and (why := refusal(item, kind)) is not None
    ]


def _batch(config: Mapping[str, Any], kind: TaskKind) -> list[str]:
    if not config["batch"].get("packing"):
        return []
    return [f"batch.packing: rows of student={NAMES[kind]} are not packed; set batch.packing=false"]


def _begin(config: Mapping[str, Any], kind: TaskKind) -> list[str]:
    name = str((config.get("student_init") or {}).get("_target_", "Pretrained")).rpartition(".")[2]
    if name not in BEGINNINGS:
        return [
            f"student_init: {name} is made for decoder-only language models; for student={NAMES[kind]} choose "
            "pretrained, from_config" + ("" if kind == "seq2seq" else " or keep_layers")
        ]
    if kind == "seq2seq" and name == "KeepLayers":
        return [
            "student_init: keep_layers does not know which of encoder and decoder to cut; for student=seq2seq choose "
            "pretrained or from_config"
        ]
    return []


def _measured(objects: Mapping[str, Any], kind: TaskKind) -> list[str]:
    """An encoder predicts nothing that an evaluation or a probe could measure."""
    if kind != "encoding":
        return []
    from kdcli.train.probe import PROBED

    problems = [
        f"{where}: {type(item).__name__} measures predictions, and student=encoder has none; drop it, and evaluate a "
        "classifier that begins with this student"
        for where, item in objects.items()
        if where.startswith("evaluation.")
    ]
    scheduler = objects.get("domain_scheduler")
    if scheduler is not None and scheduler.signals & PROBED:
        problems.append(
            f"domain_scheduler: {type(scheduler).__name__} measures predictions, and student=encoder has none; choose "
            "natural, uniform, temperature or static"
        )
    return problems


def _labels(task: Task, other: Task | None, teacher: Any) -> list[str]:
    """Both models mean the same by each class."""
    if task.kind != "classification" or other is None:
        return []
    if other.labels and other.labels != task.labels:
        same = sorted(other.labels) == sorted(task.labels)
        how = "has them in another order" if same else "has others"
        return [
            f"student.labels: the student's are {', '.join(task.labels)}, and the teacher {how}: "
            f"{', '.join(other.labels)}; set student.labels=[{','.join(other.labels)}], or teacher.labels if only the "
            "names differ"
        ]
    shape = teacher.shape()
    if shape is not None and shape.vocab_size != len(task.labels):
        return [
            f"student.labels: {len(task.labels)} labels, but the teacher has {shape.vocab_size} classes; name as many, "
            "in the order of its classes"
        ]
    return []


def _tokenizers(objects: Mapping[str, Any], kind: TaskKind) -> list[str]:
    """Labels are one vocabulary whatever the tokenizers; other tasks need one."""
    from kdcli.text.reading import differ

    if kind == "classification" or objects.get("teacher") is None:
        return []
    try:
        own, other = objects["student"].load_tokenizer(), objects["teacher"].load_tokenizer()
    except ConfigError as error:
        return list(error.problems)
    if own is None or other is None or not differ(own, other):
        return []
    return [
        f"student: its tokenizer is not the teacher's ({len(own.get_vocab()):,} and {len(other.get_vocab()):,} tokens)"
        f", and student={NAMES[kind]} compares them token by token; choose a student with the teacher's tokenizer"
    ]


def _rows(objects: Mapping[str, Any], task: Task) -> Iterator[str]:
    """The first rows of the data that this task cannot use, unless such rows may be dropped."""
    from kdcli.store.examples import BadRow
    from kdcli.text.tasks import texts_of

    data = objects.get("data")
    if data is None or data.max_bad_fraction:
        return
    told = 0
    try:
        for examples in data.domains().values():
            for example in islice(examples, demands.GLANCE):
                try:
                    texts_of(example, task)
                except BadRow as problem:
                    yield f"{example.where}: {problem}"
                    told += 1
                    if told == SHOWN:
                        return
    except ConfigError as error:
        yield from error.problems
