"""Accuracy: how often a model's first choice is the target, per domain; the teacher's too."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from kdcli.api import Batch, Data, Evaluator, Scores, Subject
from kdcli.errors import ConfigError
from kdcli.text.collate import collate
from kdcli.text.tokenize import encode

ALL = "all"
SUMS = ("correct", "teacher_correct")  # fields of Scores


class Accuracy(Evaluator):
    """`DOMAIN/accuracy` is the share of targets that the model puts first, `DOMAIN/teacher_accuracy` the teacher's, and
    `DOMAIN/targets` their number; `all` pools the targets of all domains. Of a classifier a target is a prompt's label;
    of a model that writes it is a token, given those before it.

    Scores the first `rows` rows of each domain. Raises ConfigError if a domain has no target in them.
    """

    def __init__(self, *, data: Data, rows: int | None = None, max_length: int = 512, micro_size: int = 8) -> None:
        for name, value, least in (("rows", rows, 1), ("max_length", max_length, 2), ("micro_size", micro_size, 1)):
            if value is not None and value < least:
                raise ConfigError(f"evaluation: accuracy's {name} is {value}; give at least {least}")
        self.data = data
        self.rows = rows  # per domain; None: all
        self.max_length = max_length
        self.micro_size = micro_size

    def __call__(self, subject: Subject, step: int) -> dict[str, float]:
        del step
        rows, _ = encode(self.data, subject.tokenizer, max_length=self.max_length, **subject.reading)
        if ALL in rows:
            raise ConfigError(f"evaluation: a domain cannot be called {ALL!r}, which names their pool; rename it")
        chosen = [(name, row) for name, part in rows.items() for row in part[: self.rows or len(part)]]
        # Every rank adds up the same keys, also of domains it has no row of, and scores equally often.
        sums = {f"{name}/{key}": 0.0 for name in rows for key in ("targets", *SUMS)}
        with_teacher = False
        for start in range(0, len(chosen), self.micro_size * subject.world_size):
            first = start + self.micro_size * subject.rank
            mine = chosen[first : first + self.micro_size]
            names, part = zip(*(mine or chosen[:1]), strict=True)
            batch = collate(part, pad_id=subject.tokenizer.pad_token_id or 0)
            if not mine:
                batch = replace(batch, mask=torch.zeros_like(batch.mask))
            scores = subject.score(batch)
            with_teacher = scores.teacher_correct is not None
            _add(sums, names, batch, scores)
        return _metrics(list(rows), subject.sum(sums), with_teacher)


def _add(sums: dict[str, float], names: Sequence[str], batch: Batch, scores: Scores) -> None:
    """Add each row's targets, and how many of them were put first."""
    columns = {"targets": batch.mask} | {name: getattr(scores, name) for name in SUMS}  # [B, T]
    for key, values in columns.items():
        if values is not None:
            for name, value in zip(names, values.double().sum(dim=1).tolist(), strict=True):
                sums[f"{name}/{key}"] += value


def _metrics(names: Sequence[str], sums: Mapping[str, float], with_teacher: bool) -> dict[str, float]:
    metrics = {}
    for name in [*names, ALL]:
        pooled = names if name == ALL else [name]
        targets, correct, teacher = (math.fsum(sums[f"{one}/{key}"] for one in pooled) for key in ("targets", *SUMS))
        if not targets:
            raise ConfigError(f"evaluation: the rows of domain {name} have no target; raise accuracy's rows")
        metrics[f"{name}/accuracy"] = correct / targets
        if with_teacher:
            metrics[f"{name}/teacher_accuracy"] = teacher / targets
        metrics[f"{name}/targets"] = targets
    return metrics
