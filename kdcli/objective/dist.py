"""Correlation instead of divergence: Huang et al. 2022 (DIST), arXiv:2205.10536, eq. 8 to 11.

Letters: N targets of one sequence.
"""

from __future__ import annotations

from typing import Any, Unpack

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kdcli.api import Batch, Need, Scope, Settings, StudentOutput, TeacherSignal, Unit
from kdcli.errors import ConfigError
from kdcli.objective._tempered import TemperatureScale, Tempered, Vocabulary
from kdcli.ops.chunked import chunk_size
from kdcli.ops.head import Head


class DIST(Tempered):
    """beta mean over targets of (1 - rho of q and p over the vocabulary) + gamma mean over ids of (1 - rho of the
    probabilities of the id over the sequence's targets), rho Pearson's correlation; one number per sequence.

    `beta`, `gamma` and `temperature` are the official code's (`tau`), which multiplies by tau squared
    (`temperature_scale: t2`). Departs from it, where the second term runs over all rows of a batch: over the targets
    of one sequence, so that a step can be cut into micro-batches in any way. And it adds 1e-8 to the product of the
    norms, which is far above those of nearly every id of a language model's vocabulary, so that they would count
    1 at p = q too; here rho is exact, and a row or an id whose probabilities are constant up to float32's resolution,
    for one of the models, counts 0, as all ids do in a sequence of one target. Values lie in
    [0, 2 (beta + gamma)] and are 0 at p = q.

    No [N, V] is kept: the second term is computed from five sums per id, and chunks of the head again in the backward.
    Raises ConfigError for a negative factor.
    """

    needs = Need.LOGITS
    unit = Unit.SEQUENCE
    scope = Scope.STATES

    def __init__(
        self,
        *,
        beta: float = 1.0,
        gamma: float = 1.0,
        temperature: float = 1.0,
        temperature_scale: TemperatureScale = "none",
        vocabulary: Vocabulary = "shared",
        **settings: Unpack[Settings],
    ) -> None:
        super().__init__(
            temperature=temperature, temperature_scale=temperature_scale, vocabulary=vocabulary, **settings
        )
        if not (beta >= 0 and gamma >= 0):
            raise ConfigError(f"DIST: beta is {beta} and gamma is {gamma}; set factors of at least 0")
        self.beta = beta
        self.gamma = gamma

    def forward(self, batch: Batch, student: StudentOutput, teacher: TeacherSignal) -> Tensor:
        assert student.hidden is not None and student.head is not None, "scope STATES has hidden states and a head"
        assert teacher.hidden is not None and teacher.head is not None, "a dense teacher has hidden states and a head"
        shared = min(student.head.vocab_size, teacher.head.vocab_size)
        heads = student.head.cut(shared), teacher.head.cut(shared)
        values = []
        for sequence in range(batch.num_sequences):
            kept = batch.mask & (batch.segment == sequence)
            values.append(self._distance(student.hidden[kept], teacher.hidden[kept], *heads))
        return self.scale * torch.stack(values)

    def _distance(self, hidden: Tensor, teacher_hidden: Tensor, head: Head, teacher_head: Head) -> Tensor:
        """Hidden states [N, D] and [N, D'] -> (); 0 with a graph where N = 0."""
        temperature, number = self.temperature, len(hidden)

        def part(h: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            q, p = (torch.softmax(logits / temperature, dim=-1) for logits in (head(h), teacher_head(t)))
            return _correlations(q.double(), p.double())

        if not number:
            return hidden.sum().float()
        size = chunk_size(head.vocab_size, hidden.device, buffers=16)  # of float32: eight, of float64
        rows, sums = [], hidden.new_zeros((), dtype=torch.float64)
        for pair in zip(hidden.split(size), teacher_hidden.split(size), strict=True):
            of_targets, of_ids = _recomputed(part, *pair)
            rows.append(of_targets)
            sums = sums + of_ids
        value = self.beta * torch.cat(rows).mean() + self.gamma * _recomputed(_column_distance, sums, number)
        return value.to(torch.promote_types(hidden.dtype, torch.float32))


def _correlations(q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities [C, V] -> 1 - rho of each target [C], and the sums over targets of q, p, q q, p p, q p, [5, V]."""
    a, b = (x - 1 / x.shape[-1] for x in (q, p))  # the mean of probabilities is known
    of_rows = _one_minus_rho(
        (a * b).sum(-1), a.square().sum(-1), b.square().sum(-1), q.square().sum(-1), p.square().sum(-1)
    )
    return of_rows, torch.stack([q.sum(0), p.sum(0), q.square().sum(0), p.square().sum(0), (q * p).sum(0)])


def _column_distance(sums: Tensor, number: int) -> Tensor:
    """The five sums [5, V] over `number` targets -> mean over ids of 1 - rho, ()."""
    q, p, qq, pp, qp = sums
    return _one_minus_rho(qp - q * p / number, qq - q * q / number, pp - p * p / number, qq, pp).mean()


def _one_minus_rho(covariance: Tensor, one: Tensor, other: Tensor, one_size: Tensor, other_size: Tensor) -> Tensor:
    """1 - covariance / sqrt(one other), of sums of squares about the mean; 0 where either is nothing beside the sum of
    squares about 0."""
    varied = (one > _CONSTANT * one_size) & (other > _CONSTANT * other_size)
    norms = torch.where(varied, one, 1.0).sqrt() * torch.where(varied, other, 1.0).sqrt()
    return torch.where(varied, 1 - covariance / norms, 0.0)


def _recomputed(function: Any, *arguments: Any) -> Any:
    """`function` of the arguments, keeping nothing inside it: the backward computes it again."""
    if not torch.is_grad_enabled():
        return function(*arguments)
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


_CONSTANT = 1e-10  # the square of 1e-5: what a softmax of float32 logits errs by, relatively
