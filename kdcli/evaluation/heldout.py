"""Held-out text: perplexity, KL to the teacher and agreement with it, per domain."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from kdcli.api import Batch, Data, Evaluator, Scores, Subject
from kdcli.errors import ConfigError
from kdcli.text.collate import collate
from kdcli.text.tokenize import encode

ALL = "all"
SUMS = ("nll", "teacher_nll", "kl", "agree")  # fields of Scores


class Heldout(Evaluator):
    """Scores the first `rows` rows of each domain, none packed; longer documents are split into rows.

    `DOMAIN/ppl` and `DOMAIN/teacher_ppl` are exp(nats per target), `kl` is KL(teacher || student) in nats per target,
    `agree` the share of targets where both put the same token first, `tokens` the number of targets; `all` pools the
    targets of all domains. Without a teacher there are only `ppl` and `tokens`. The rows are cut into the same
    micro-batches whatever the number of ranks, so the numbers do not depend on it.

    Raises ConfigError if a domain has no target in those rows.
    """

    def __init__(self, *, data: Data, rows: int | None = 32, max_length: int = 512, micro_size: int = 4) -> None:
        for name, value, least in (("rows", rows, 1), ("max_length", max_length, 2), ("micro_size", micro_size, 1)):
            if value is not None and value < least:
                raise ConfigError(f"evaluation: heldout's {name} is {value}; give at least {least}")
        self.data = data
        self.rows = rows  # per domain; None: all
        self.max_length = max_length
        self.micro_size = micro_size
        self._parts: list[_Part] | None = None

    def __call__(self, subject: Subject, step: int) -> dict[str, float]:
        del step
        if self._parts is None:
            self._parts = self._prepare(subject.tokenizer, subject.reading)
        names = list(dict.fromkeys(name for part in self._parts for name in part.domains))
        # Every rank adds up the same keys, also of domains it has no row of.
        sums = {f"{name}/{key}": 0.0 for name in names for key in ("tokens", *SUMS)}
        for part in _share(self._parts, subject.rank, subject.world_size):
            scores = subject.score(part.batch)
            for key, value in _row_sums(part, scores):
                sums[key] += value
        sums["teacher"] = float(scores.teacher_nll is not None)  # every rank has scored at least one part
        return _metrics(names, subject.sum(sums))

    def _prepare(self, tokenizer: Any, reading: Mapping[str, Any]) -> list[_Part]:
        rows_by_domain, _ = encode(self.data, tokenizer, max_length=self.max_length, overflow="split", **reading)
        if ALL in rows_by_domain:
            raise ConfigError(f"evaluation: a domain cannot be called {ALL!r}, which names their pool; rename it")
        chosen = [(name, row) for name, rows in rows_by_domain.items() for row in rows[: self.rows]]
        parts = []
        for start in range(0, len(chosen), self.micro_size):
            names, rows = zip(*chosen[start : start + self.micro_size], strict=True)
            parts.append(_Part(names, collate(rows, pad_id=tokenizer.pad_token_id)))
        return parts


@dataclass(frozen=True)
class _Part:
    """A micro-batch, and the domain of each of its rows."""

    domains: tuple[str, ...]
    batch: Batch


def _share(parts: list[_Part], rank: int, world_size: int) -> list[_Part]:
    """This rank's parts: every rank has equally many, the last ones filled up with a repeat that counts nothing."""
    mine = parts[rank::world_size]
    blank = replace(parts[0], batch=replace(parts[0].batch, mask=torch.zeros_like(parts[0].batch.mask)))
    return mine + [blank] * (math.ceil(len(parts) / world_size) - len(mine))


def _row_sums(part: _Part, scores: Scores) -> Iterator[tuple[str, float]]:
    """(DOMAIN/tokens or DOMAIN/score, its sum over the targets of one row)."""
    columns = {"tokens": part.batch.mask} | {name: getattr(scores, name) for name in SUMS}
    for key, values in columns.items():  # [B, T]
        if values is not None:
            rows = values.double().sum(dim=1).tolist()
            yield from ((f"{domain}/{key}", row) for domain, row in zip(part.domains, rows, strict=True))


def _metrics(names: list[str], total: Mapping[str, float]) -> dict[str, float]:
    metrics = {}
    for name in [*names, ALL]:
        pooled = names if name == ALL else [name]
        tokens, *sums = (math.fsum(total[f"{each}/{key}"] for each in pooled) for key in ("tokens", *SUMS))
        if tokens == 0:
            raise ConfigError(f"evaluation: the held-out rows of domain {name} have no target; raise heldout's rows")
        nll, teacher_nll, kl, agree = (value / tokens for value in sums)
        metrics[f"{name}/ppl"] = _exp(nll)
        if total["teacher"]:
            metrics |= {f"{name}/teacher_ppl": _exp(teacher_nll), f"{name}/kl": kl, f"{name}/agree": agree}
        metrics[f"{name}/tokens"] = tokens
    return metrics


def _exp(nats: float) -> float:
    """exp, infinite where it would overflow."""
    return math.inf if nats > 700 else math.exp(nats)
