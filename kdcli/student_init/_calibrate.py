"""Calibration data: some rows to rank by, and others, which no ranking sees, to say what a cut has cost."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice, zip_longest
from typing import Any

import torch
from torch import Tensor

from kdcli.api import Batch, Data, Example
from kdcli.errors import ConfigError
from kdcli.ops.chunked import chunk_size, target_logprobs
from kdcli.ops.head import Head
from kdcli.store.models import real_ids
from kdcli.store.tokens import Row
from kdcli.student_init._models import size
from kdcli.text.collate import collate
from kdcli.text.tokenize import encode
from kdcli.text.vocabulary import token_keys

MICRO = 4  # rows of one forward


class Calibration:
    """`rows` rows of `data` to rank by and `heldout` further ones to measure on, drawn from all domains in turn, each
    the beginning of another example, of at most `max_length` tokens. The same rows on every rank and in every run.

    Raises ConfigError where a setting is too small, and, from `check` on, where the data have fewer rows.
    """

    def __init__(self, *, data: Data, rows: int, heldout: int, max_length: int) -> None:
        for name, value, least in (("rows", rows, 1), ("heldout", heldout, 1), ("max_length", max_length, 2)):
            if value < least:
                raise ConfigError(f"student_init.{name} is {value}; give at least {least}")
        self.data, self.rows, self.heldout, self.max_length = data, rows, heldout, max_length

    def check(self, tokenizer: Any) -> None:
        """Raises ConfigError, such as for a file that is not there."""
        self._drawn(tokenizer)

    def to_rank_by(self, tokenizer: Any, device: torch.device | str) -> list[Batch]:
        return batches(self._drawn(tokenizer)[: self.rows], tokenizer, device)

    def held_out(self, tokenizer: Any, device: torch.device | str) -> list[Batch]:
        return batches(self._drawn(tokenizer)[self.rows :], tokenizer, device)

    def _drawn(self, tokenizer: Any) -> list[Row]:
        wanted = self.rows + self.heldout
        drawn = first_rows(self.data, tokenizer, wanted, self.max_length)
        if len(drawn) < wanted:
            raise ConfigError(
                f"student_init.data has {len(drawn)} rows, fewer than student_init.rows + student_init.heldout = "
                f"{self.rows} + {self.heldout}; lower them, or add rows"
            )
        return drawn


class _First(Data):
    """The first examples of each domain of other data."""

    def __init__(self, data: Data, number: int) -> None:
        self.data, self.number = data, number
        self.max_bad_fraction = data.max_bad_fraction

    def domains(self) -> Mapping[str, Iterable[Example]]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return {name: list(islice(examples, self.number)) for name, examples in self.data.domains().items()}

    def fingerprint(self) -> str:
        return f"{self.data.fingerprint()}, {self.number} first of each domain"

    def bad_rows(self) -> dict[str, str]:
        return self.data.bad_rows()


def first_rows(data: Data, tokenizer: Any, number: int, max_length: int) -> list[Row]:
    """Up to `number` rows, each the beginning of another example: the first of each domain, the second of each, …"""
    domains, _ = encode(_First(data, number), tokenizer, max_length=max_length, overflow="truncate")
    return [row for turn in zip_longest(*domains.values()) for row in turn if row is not None][:number]


def batches(rows: Sequence[Row], tokenizer: Any, device: torch.device | str) -> list[Batch]:
    """The rows in order, `MICRO` at a time, padded."""
    pad = tokenizer.pad_token_id or 0
    return [collate(rows[i : i + MICRO], pad_id=pad).to(device) for i in range(0, len(rows), MICRO)]


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """The model in evaluation mode and without gradients."""
    training = model.training
    try:
        model.eval()
        with torch.no_grad(), torch.autocast(model.device.type, enabled=False):
            yield
    finally:
        model.train(training)


def nats_of(hidden: Tensor, batch: Batch, head: Head) -> float:
    """The summed negative log-likelihood of a batch's targets, from the hidden states [B, T, D] before the head."""
    chunk = chunk_size(head.vocab_size, hidden.device)
    return -float(target_logprobs(hidden[batch.mask], head, batch.targets[batch.mask], chunk).double().sum())


def nats_per_target(model: Any, tokenizer: Any, held_out: Sequence[Batch]) -> float:
    """Mean negative log-likelihood of the targets, over the tokenizer's real ids."""
    head = Head.of(model, real_ids(tokenizer))
    with evaluating(model):
        total = sum(nats_of(model.base_model(**one.model_inputs()).last_hidden_state, one, head) for one in held_out)
    return total / sum(int(one.mask.sum()) for one in held_out)


@dataclass(frozen=True)
class Measured:
    """How well a model predicts held-out text, in its own tokens; per byte, different tokenizers compare. A special
    token stands for no byte."""

    nats: float
    targets: int
    bytes: int

    @classmethod
    def of(cls, model: Any, tokenizer: Any, held_out: Sequence[Batch]) -> Measured:
        widths = torch.tensor([len(key) if isinstance(key, bytes) else 0 for key in token_keys(tokenizer)])
        targets = torch.cat([one.targets[one.mask].cpu() for one in held_out])
        nats = nats_per_target(model, tokenizer, held_out) * len(targets)
        return cls(nats, len(targets), int(widths[targets].sum()))

    def __str__(self) -> str:
        """`perplexity 20.53 per token, 0.8312 nats per byte`"""
        return f"perplexity {perplexity(self.nats / self.targets):.4g} per token, {self.per_byte:.4g} nats per byte"

    @property
    def per_byte(self) -> float:
        return self.nats / max(1, self.bytes)


def perplexity(nats: float) -> float:
    """exp, infinite where it would overflow."""
    return math.inf if nats > 700 else math.exp(nats)


def compared(source: Any, model: Any, tokenizer: Any, held_out: Sequence[Batch]) -> str:
    """What a cut has cost, on one line: sizes and held-out perplexity, before and after."""
    before, after = (perplexity(nats_per_target(one, tokenizer, held_out)) for one in (source, model))
    count = sum(int(one.mask.sum()) for one in held_out)
    rows = sum(one.num_sequences for one in held_out)
    return (
        f"{size(model)}, cut from {size(source)}; held-out perplexity {before:.4g} -> {after:.4g} "
        f"({count:,} targets of {rows} rows)"
    )
