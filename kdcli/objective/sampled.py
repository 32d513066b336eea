"""Random-sampling knowledge distillation: Anshumann et al. 2025 (RS-KD), arXiv:2503.16870."""

from __future__ import annotations

import math
from typing import ClassVar, Unpack

import torch
from torch import Tensor

from kdcli.api import Batch, StudentOutput, TeacherSignal
from kdcli.errors import ConfigError
from kdcli.objective._tempered import Tempered, TemperedSettings
from kdcli.ops.draws import draw, keys_of, mixed


class Sampled(Tempered):
    """-sum_j w_j log q_j over ids j drawn from the teacher, whose gradient q - w is q - p in the mean of the draws.

    A dense teacher: `samples` ids per target are drawn from r with r_v in proportion to p_v^tau and weigh p / r,
    divided by their sum. At tau = 1 the weights are 1 / samples, and value and gradient are unbiased; elsewhere they
    are so in the limit of many samples. A teacher that has drawn already gives the ids and their weights, as
    log-probabilities, such as log(count / samples), -inf for an entry that stands for none; they are divided by their
    sum, and `samples`, `tau` and `seed` change nothing. The K likeliest ids, which are no random sample, are refused:
    with them this would be the biased loss that the paper warns of, and forward_kl is right. The mean of the value is
    KL(p || q) + H(p): it is not zero at p = q.

    The draws of a target depend on `seed`, the key of its sequence's content, the token before it and its own: not on
    chunks, micro-batches, ranks, packing or the step. A second epoch sees the same, as it would from a cache. They
    are stratified, draw j from the j-th of `samples` equal parts of the cumulative distribution, in which this
    departs from the paper: the same mean, less variance. `samples` is the paper's N, `tau` its proposal's exponent.
    Raises ConfigError if there are no samples or tau is not positive.
    """

    zero_at_teacher: ClassVar[bool] = False
    draws: ClassVar[bool] = True  # at random, by the order of ids: other names of the ids draw others

    def __init__(
        self, *, samples: int = 50, tau: float = 1.0, seed: int = 0, **settings: Unpack[TemperedSettings]
    ) -> None:
        super().__init__(**settings)
        if samples < 1:
            raise ConfigError(f"Sampled: samples is {samples}; set at least one draw per target")
        if not tau > 0:
            raise ConfigError(f"Sampled: tau is {tau}; set an exponent above 0, 1 to draw from the teacher itself")
        self.samples = samples
        self.tau = tau
        self.seed = seed

    def forward(self, batch: Batch, student: StudentOutput, teacher: TeacherSignal) -> Tensor:
        ids, weights = self.drawn(batch, teacher)
        return -self.scale * (weights * student.log_q(self.temperature).gather(-1, ids)).sum(-1)

    def closed_form(self, batch: Batch, student: StudentOutput, teacher: TeacherSignal) -> tuple[Tensor, Tensor]:
        """q - w."""
        ids, weights = self.drawn(batch, teacher)
        log_q = student.log_q(self.temperature)
        value = -(weights * log_q.gather(-1, ids)).sum(-1)
        return self.scaled(value, log_q.exp().scatter_add_(-1, ids, -weights.to(log_q.dtype)))

    def drawn(self, batch: Batch, teacher: TeacherSignal) -> tuple[Tensor, Tensor]:
        """Ids, perhaps some of them twice, and weights that sum to one, both [1, C, samples] or [1, C, K]."""
        if teacher.topk is not None:
            if not teacher.topk.sampled:
                raise ConfigError(
                    "Sampled: the teacher gives its likeliest ids, which are no random sample, so the loss would be "
                    "biased; set objective=forward_kl, or draw ids: kdcli cache cache.codec=sampled"
                )
            if teacher.topk.temperature != self.temperature:
                raise ConfigError(
                    f"Sampled: temperature is {self.temperature} but the teacher's samples were drawn at "
                    f"{teacher.topk.temperature}; set the same, or draw them again"
                )
            logprobs = teacher.topk.logprobs
            nothing = (logprobs == -math.inf).all(-1, keepdim=True)  # all that was drawn is no id of the student's
            return teacher.topk.ids, torch.softmax(logprobs, dim=-1).masked_fill(nothing, 0.0)
        log_p = teacher.log_p(self.temperature)
        assert log_p is not None, "a teacher is dense (logits) or sparse (topk)"
        proposal = log_p if self.tau == 1 else torch.log_softmax(self.tau * log_p, dim=-1)
        ids = self._ids(batch, proposal)
        return ids, torch.softmax((1 - self.tau) * log_p.gather(-1, ids), dim=-1)

    def _ids(self, batch: Batch, proposal: Tensor) -> Tensor:
        """[1, C, samples] from log-probabilities [1, C, V]."""
        sequence = keys_of(batch.row or [""] * batch.num_sequences, self.seed, proposal.device)
        return draw(proposal, mixed(sequence[batch.segment], batch.input_ids, batch.targets), self.samples)
