"""Correlation instead of divergence: Huang et al. 2022 (DIST), arXiv:2205.10536, eq. 8 to 11.

Letters: N targets of the micro-batch, P sequences of a chunk.
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


class DIST(Tempered):
    """beta mean over targets of (1 - rho of q and p over the vocabulary) + gamma mean over ids of (1 - rho of the
    probabilities of the id over the sequence's targets), rho Pearson's correlation; one number per sequence.

    `beta`, `gamma` and `temperature` are the official code's (`tau`), which multiplies by tau squared
    (`temperature_scale: t2`). Departs from it in whose targets the second term runs over, all rows of a batch there:
    here those of one sequence, so that a step can be cut into micro-batches in any way. And in its eps of 1e-8: of
    covariance / (norms + eps), which is next to 0 at p = q for most ids of a language model's vocabulary, the
    numerator gets it too. 1 - rho is so multiplied by norms / (norms + eps): unlikely ids count little, as there, but
    value and gradient vanish at p = q. A row or an id whose probabilities are constant up to float32's resolution,
    for one of the models, counts 0, as all ids do in a sequence of one target. Values lie in [0, 2 (beta + gamma)].

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
        head, teacher_head = student.head.cut(shared), teacher.head.cut(shared)
        hidden, sequence = student.hidden[batch.mask], batch.segment[batch.mask]  # [N, D], [N]
        number, temperature = batch.targets_by_sequence().double().clamp(min=1), self.temperature

        def part(h: Tensor, t: Tensor, members: Tensor) -> tuple[Tensor, Tensor]:
            q, p = (torch.softmax(logits / temperature, dim=-1) for logits in (head(h), teacher_head(t)))
            return _sums(q.double(), p.double(), members)

        of_rows = hidden.sum().double() * torch.zeros_like(number)  # 0 with a graph where N = 0
        of_ids = hidden.new_zeros(len(number), 5, shared, dtype=torch.float64)
        size = chunk_size(shared, hidden.device, buffers=16)  # of float32: eight, of float64
        for h, t, segment in zip(*(x.split(size) for x in (hidden, teacher.hidden[batch.mask], sequence)), strict=True):
            present = segment.unique()
            members = (present.unsqueeze(1) == segment).double()
            rows, sums = _recomputed(part, h, t, members)
            of_rows = of_rows.index_add(0, segment, rows)
            of_ids.index_add_(0, present, sums)  # in place: a copy for every chunk would be larger than the chunk
        columns = _recomputed(_column_distance, of_ids, number)
        values = self.scale * (self.beta * of_rows / number + self.gamma * columns)
        return values.to(torch.promote_types(hidden.dtype, torch.float32))


def _sums(q: Tensor, p: Tensor, members: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities [C, V], and which targets are of which of P sequences [P, C] -> 1 - rho of each target [C], and the
    sums over each sequence's targets of q, p, q q, p p and q p, [P, 5, V]."""
    a, b = (x - 1 / x.shape[-1] for x in (q, p))  # the mean of probabilities is known
    rows = _one_minus_rho((a * b).sum(-1), *(x.square().sum(-1) for x in (a, b, q, p)))
    return rows, torch.stack([members @ x for x in (q, p, q.square(), p.square(), q * p)], dim=1)


def _column_distance(sums: Tensor, number: Tensor) -> Tensor:
    """The five sums [E, 5, V] over `number` [E] targets -> mean over ids of 1 - rho, [E]."""
    q, p, qq, pp, qp = sums.unbind(1)
    n = number.unsqueeze(-1)
    return _one_minus_rho(qp - q * p / n, qq - q * q / n, pp - p * p / n, qq, pp).mean(-1)


def _one_minus_rho(covariance: Tensor, one: Tensor, other: Tensor, one_size: Tensor, other_size: Tensor) -> Tensor:
    """(norms - covariance) / (norms + 1e-8) of sums of squares about the mean, norms = sqrt(one other); 0 where either
    is nothing beside the sum of squares about 0."""
    varied = (one > _CONSTANT * one_size) & (other > _CONSTANT * other_size)
    norms = torch.where(varied, one, 1.0).sqrt() * torch.where(varied, other, 1.0).sqrt()
    return torch.where(varied, (norms - covariance) / (norms + _UNLIKELY), 0.0)


def _recomputed(function: Any, *arguments: Any) -> Any:
    """`function` of the arguments, keeping nothing inside it: the backward computes it again."""
    if not torch.is_grad_enabled():
        return function(*arguments)
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


_UNLIKELY = 1e-8  # the official code's eps
_CONSTANT = 1e-10  # the square of 1e-5: what a softmax of float32 logits errs by, relatively
