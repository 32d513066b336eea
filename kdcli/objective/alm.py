"""Approximate likelihood matching: Minixhofer et al. 2025 (ALM), arXiv:2503.20083."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor

from kdcli.api import Batch, Need, Objective, Scope, StudentOutput, TeacherSignal, TokenSettings
from kdcli.errors import ConfigError
from kdcli.objective._between import Between, between
from kdcli.objective._spans import spans_of
from kdcli.ops.logprob import log1mexp


class ALM(Objective):
    """D((P, 1 - P), (Q, 1 - Q)) with P = p(span)^(1 / T) and Q = q(span)^(1 / T): one number per span.

    A span is the shortest stretch of text that both tokenizers cut alike, p(span) the product of the teacher's
    probabilities of its tokens, and T `temperature`, tokenkit's `binarization_temp` (100): the likelihoods of long
    spans are tiny, and without it their complements all 1. `divergence` is the paper's f; tokenkit's `binary_ce` has
    the gradient of forward_kl, its `reverse_binary_kl` is reverse_kl and its `abs_exp` total_variation.

    The number stands at the span's first target. Departs from tokenkit by leaving out its debiasing (the probability
    that a token boundary follows the span, `append_space`, and the joining of spans by it) and by bounding 1 - P from
    below only where P is 1 to float32, in place of a shift of 1e-6 that damps confident spans. Raises ConfigError if
    the temperature is not positive.
    """

    needs = Need.LOGPROBS
    scope = Scope.LOGPROBS
    cross_tokenizer = True
    zero_at_teacher = True

    def __init__(
        self, *, divergence: Between = "forward_kl", temperature: float = 100.0, **settings: Unpack[TokenSettings]
    ) -> None:
        super().__init__(**settings)
        if not temperature > 0:
            raise ConfigError(f"ALM: temperature is {temperature}; set a number above 0")
        self.divergence: Between = divergence
        self.temperature = temperature

    def units(self, batch: Batch) -> Tensor:
        return super().units(batch) & spans_of(batch).starts()

    def forward(self, batch: Batch, student: StudentOutput, teacher: TeacherSignal) -> Tensor:
        spans = spans_of(batch)
        foreign = batch.teacher is not None and batch.teacher.foreign
        of_teacher = teacher.own_logprobs if foreign else teacher.logprobs
        assert student.logprobs is not None and of_teacher is not None, "both models score their targets"
        log_p = self._happens(spans.sums(of_teacher, spans.teacher))
        log_q = self._happens(spans.sums(student.logprobs, spans.student))
        return spans.at_starts(between(self.divergence, log_p, log_q))

    def _happens(self, logprobs: Tensor) -> Tensor:
        """Log-likelihoods [S] -> log-probabilities [S, 2] that a span comes, and that it does not."""
        happens = logprobs.clamp(max=-1e-10) / self.temperature  # log 0 has no slope; rounding may pass 0
        return torch.stack([happens, log1mexp(happens)], -1)
