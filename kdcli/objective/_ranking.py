"""The interface of losses that ask the student to order ids as the teacher does."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, Unpack

import torch
from torch import Tensor

from kdcli.api import Batch, Need, Objective, StudentOutput, TeacherSignal, TokenSettings
from kdcli.errors import ConfigError
from kdcli.objective._tempered import Vocabulary, refuse_other_vocabulary


class RankingSettings(TokenSettings, total=False):
    """Settings of every ranking loss."""

    top_k: int
    vocabulary: Vocabulary


class Ranking(Objective):
    """Mean over pairs k, l of the teacher's `top_k` likeliest ids with p_k > p_l of a loss of the gap z_k - z_l.

    A top-k teacher gives its K; of those, and of a dense teacher's vocabulary, the `top_k` likeliest count. Ties of
    the teacher are no pairs; 0 where there is none. Needs no softmax: the gradient is 0 but at those ids. A
    temperature would change no order, so there is none. `vocabulary` as in kdcli.objective._tempered. Takes
    [C, K, K] numbers. Raises ConfigError if `top_k` is below 2.
    """

    needs = Need.DISTRIBUTION

    def __init__(self, *, top_k: int = 8, vocabulary: Vocabulary = "shared", **settings: Unpack[TokenSettings]) -> None:
        super().__init__(**settings)
        if top_k < 2:
            raise ConfigError(f"{type(self).__name__}: top_k is {top_k}; set at least 2 ids, or there is no pair")
        self.top_k = top_k
        self.vocabulary = vocabulary

    def match(self, student: Any, teacher: Any) -> None:
        if self.vocabulary == "error":
            refuse_other_vocabulary(type(self).__name__, student, teacher)

    @abstractmethod
    def pair_loss(self, gap: Tensor, teacher_gap: Tensor) -> tuple[Tensor, Tensor]:
        """Gaps z_k - z_l and log p_k - log p_l, [..., K, K] -> the loss of each pair, and its slope by z_k - z_l."""

    def forward(self, batch: Batch, student: StudentOutput, teacher: TeacherSignal) -> Tensor:
        assert student.logits is not None, "logits exist only inside a chunk"
        ids, logprobs, share = self._ranked(teacher)
        z = student.logits.gather(-1, ids)
        value, _ = self.pair_loss(_gaps(z), _gaps(logprobs))
        return (value * share).sum((-2, -1))

    def closed_form(self, batch: Batch, student: StudentOutput, teacher: TeacherSignal) -> tuple[Tensor, Tensor]:
        """The slope of each pair, at z_k, and its opposite at z_l."""
        assert student.logits is not None, "logits exist only inside a chunk"
        ids, logprobs, share = self._ranked(teacher)
        value, slope = self.pair_loss(_gaps(student.logits.gather(-1, ids)), _gaps(logprobs))
        slope = slope * share
        gradient = torch.zeros_like(student.logits).scatter_add_(-1, ids, slope.sum(-1) - slope.sum(-2))
        return (value * share).sum((-2, -1)), gradient

    def _ranked(self, teacher: TeacherSignal) -> tuple[Tensor, Tensor, Tensor]:
        """Ids and log-probabilities [1, C, K] of the teacher's likeliest, and each pair's share [1, C, K, K].
        Raises ConfigError for ids drawn at random: how often one was drawn is no rank."""
        if teacher.topk is not None:
            if teacher.topk.sampled:
                raise ConfigError(
                    f"{type(self).__name__}: the teacher gives ids drawn at random, which have no order; set "
                    "objective=sampled, or store the likeliest ids: kdcli cache cache.codec=topk"
                )
            kept = min(self.top_k, teacher.topk.ids.shape[-1])
            logprobs, order = teacher.topk.logprobs.topk(kept, dim=-1)
            none = logprobs == -math.inf  # stands for no id, so for no pair
            share = _pair_share(logprobs, ~none)
            ids = teacher.topk.ids.gather(-1, order).masked_fill(none, 0)
            return ids, logprobs.masked_fill(none, 0.0), share
        assert teacher.logits is not None, "a teacher is dense (logits) or sparse (topk)"
        logits, ids = teacher.logits.topk(min(self.top_k, teacher.logits.shape[-1]), dim=-1)
        return ids, logits, _pair_share(logits)  # gaps of logits are gaps of log-probabilities


def _gaps(values: Tensor) -> Tensor:
    """[..., K] -> [..., K, K]: value k minus value l."""
    return values.unsqueeze(-1) - values.unsqueeze(-2)


def _pair_share(logprobs: Tensor, some: Tensor | None = None) -> Tensor:
    """[..., K, K]: 1 / number of pairs where p_k > p_l, else 0. `some` [..., K] bool: the entries that count."""
    above = logprobs.unsqueeze(-1) > logprobs.unsqueeze(-2)
    pairs = (above if some is None else above & some.unsqueeze(-2)).to(logprobs.dtype)
    return pairs / pairs.sum((-2, -1), keepdim=True).clamp(min=1)
