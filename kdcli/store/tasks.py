"""What a model makes of a row, settled between student and teacher before weights load; the labels of a classifier."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from kdcli.api import Student, Task, Teacher
from kdcli.errors import ConfigError

UNNAMED = re.compile(r"LABEL_\d+")  # transformers' own names


def task_of(student: Student, teacher: Teacher) -> Task:
    """Set and return `student.task`, with the teacher's labels where the student names none.

    Raises ConfigError where nobody does.
    """
    task = student.load_task()
    if task.kind == "classification" and not task.labels:
        other = teacher.load_task()
        task = replace(task, labels=other.labels if other is not None else ())
        if not task.labels:
            raise ConfigError("student.labels: which labels are there? add student.labels=[first,second,…]")
    student.task = task
    return task


def named_labels(labels: Sequence[str] | None, where: str) -> tuple[str, ...]:
    """Labels that a config names; () for none. Raises ConfigError for fewer than two, or one that stands twice."""
    if labels is None:
        return ()
    names = tuple(str(label).strip() for label in labels)
    twice = next((name for name in names if names.count(name) > 1), None)
    if len(names) < 2 or "" in names or twice is not None:
        problem = f"{twice} stands twice" if twice is not None else f"{list(names)} is too few, or one is empty"
        raise ConfigError(f"{where}.labels: {problem}; name two or more different labels")
    return names


def labels_in(config: Any) -> tuple[str, ...]:
    """The labels of a transformers config, in the order of its classes; () where they have no names of their own."""
    names: Mapping[int, str] = config.id2label or {}
    labels = tuple(str(names[i]) for i in sorted(names))
    return () if all(UNNAMED.fullmatch(label) for label in labels) else labels


def with_labels(config: Any, labels: Sequence[str]) -> Any:
    """The config with these classes."""
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: index for index, label in enumerate(labels)}
    return config
