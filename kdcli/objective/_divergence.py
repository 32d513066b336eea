"""The interface of divergences of the teacher's and the student's distribution, on the vocabulary or on top-k."""

from __future__ import annotations

from abc import abstractmethod
from typing import Unpack

import torch
from torch import Tensor

from kdcli.api import Batch, StudentOutput, TeacherSignal, TopK
from kdcli.errors import ConfigError
from kdcli.objective._tempered import Tempered, TemperedSettings
from kdcli.ops.support import Missing, on_support, student_side, teacher_side


class DivergenceSettings(TemperedSettings, total=False):
    """Settings of every divergence."""

    missing: Missing


class Divergence(Tempered):
    """D(p, q) per target, where a sparse teacher's p and q are over its K ids and "the rest".

    `missing` says what the rest is, where a teacher gives K ids only: `tail`, one symbol more, so that
    an f-divergence is a lower bound of the dense one; `renormalize`, left out on both sides, which then compare what
    is given that it is one of the K; `teacher_only`, of probability 0 to the teacher, whose K are renormalized, and
    one symbol of the student's. DistillKit calls them SYMMETRIC_UNIFORM, none, ZERO; TRL's `add_tail` is tail or
    renormalize. The raw sum over K ids that some code takes falls below 0 and is not offered. Where the teacher's
    rest counts as 0 (`teacher_only`) it is held at e^-100: only then are divergences that divide by p finite.
    """

    def __init__(self, *, missing: Missing = "tail", **settings: Unpack[TemperedSettings]) -> None:
        super().__init__(**settings)
        self.missing: Missing = missing

    @abstractmethod
    def divergence(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """Log-probabilities [..., S] of teacher and student -> nats [...]."""

    def divergence_gradient(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor] | None:
        """Value [...] and its gradient with respect to z where log_q = log_softmax(z), [..., S]; None: autograd."""
        return None

    def forward(self, batch: Batch, student: StudentOutput, teacher: TeacherSignal) -> Tensor:
        log_q, topk = student.log_q(self.temperature), self._topk(teacher)
        if topk is None:
            pair = on_support(log_q, log_p=teacher.log_p(self.temperature))
        else:
            pair = on_support(log_q, ids=topk.ids, logprobs=topk.logprobs, missing=self.missing)
        return self.scale * self.divergence(*pair)

    def closed_form(self, batch: Batch, student: StudentOutput, teacher: TeacherSignal) -> tuple[Tensor, Tensor] | None:
        topk = self._topk(teacher)
        if topk is not None:
            return self._sparse_closed_form(student, topk)
        log_p = teacher.log_p(self.temperature)
        assert log_p is not None, "a teacher is dense (logits) or sparse (topk)"
        result = self.divergence_gradient(*on_support(student.log_q(self.temperature), log_p=log_p))
        return None if result is None else self.scaled(*result)

    def _sparse_closed_form(self, student: StudentOutput, topk: TopK) -> tuple[Tensor, Tensor] | None:
        """The gradient on K + 1 symbols, taken back to the vocabulary: exact for every divergence."""
        logits = student.logits
        assert logits is not None, "logits exist only inside a chunk"
        if next(self.parameters(), None) is not None:
            return None  # what a subclass learns has a gradient too
        log_p = teacher_side(topk.logprobs, logits, self.missing)
        log_q, back = student_side(logits, topk.ids, self.temperature, self.missing, logprobs=topk.logprobs)
        value, gradient = self.divergence_gradient(log_p, log_q) or self._derived(log_p, log_q)
        return self.scaled(value, back(gradient))

    def _derived(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        """`divergence_gradient` by autograd: cheap on K + 1 symbols."""
        with torch.enable_grad():
            leaf = log_q.detach().requires_grad_()
            value = self.divergence(log_p, torch.log_softmax(leaf, dim=-1))
            (gradient,) = torch.autograd.grad(value.sum(), leaf)
        return value.detach(), gradient

    def _topk(self, teacher: TeacherSignal) -> TopK | None:
        """The teacher's top-k, None for a dense teacher; refuses one stored at another temperature, or a sample."""
        topk = teacher.topk
        if topk is not None and topk.sampled:
            raise ConfigError(
                f"{type(self).__name__}: the teacher gives ids drawn at random, of which a divergence would be biased; "
                "set objective=sampled, or store the likeliest ids: kdcli cache cache.codec=topk"
            )
        if topk is not None and topk.temperature != self.temperature:
            raise ConfigError(
                f"{type(self).__name__}: temperature is {self.temperature} but the teacher's log-probabilities "
                f"were stored at {topk.temperature}; set the same, or store them again"
            )
        return topk
