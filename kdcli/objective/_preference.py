"""Which answers of a group are better than which others, and the interface of losses of such pairs.

Letters: P pairs (better, worse) of one group, G groups, E sequences.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kdcli.api import Batch, Objective, Scope, StudentOutput, TeacherSignal, Unit


@dataclass(frozen=True)
class Ranking:
    """The answers of a micro-batch in the order that the data give within each group.

    A preference pair has the merits 0 (better) and -1 (rejected), whatever scores it carries; the answers of any
    other group have their scores. An answer without either, or that cannot be used, is in no pair, and neither are
    two answers of equal merit.
    """

    merit: Tensor  # [E] float64, NaN where the data do not say
    group: Tensor  # [E] int64
    usable: Tensor  # [E] bool

    @classmethod
    def of(cls, batch: Batch, usable: Tensor | None = None) -> Ranking:
        """`usable` [E] bool: answers that a loss has a number for; by default those with a supervised target."""
        return cls(merit_of(batch), batch.groups(), batch.targets_by_sequence() > 0 if usable is None else usable)

    @cached_property
    def num_groups(self) -> int:
        return int(self.group.max()) + 1

    @cached_property
    def ranked(self) -> Tensor:
        """[E] bool: usable, and of known merit."""
        return self.usable & ~self.merit.isnan()

    @cached_property
    def together(self) -> Tensor:
        """[E, E] bool: both ranked, and of one group."""
        return (self.group[:, None] == self.group) & self.ranked[:, None] & self.ranked

    @cached_property
    def beats(self) -> Tensor:
        """[E, E] bool: the row's answer is better than the column's."""
        return self.together & (self.merit[:, None] > self.merit)

    @cached_property
    def pairs(self) -> tuple[Tensor, Tensor]:
        """(better [P], worse [P]), indices of sequences."""
        better, worse = self.beats.nonzero(as_tuple=True)
        return better, worse

    @cached_property
    def pairs_by_group(self) -> Tensor:
        """[G] int64: how many pairs each group has."""
        return torch.bincount(self.group[self.pairs[0]], minlength=self.num_groups)

    @cached_property
    def best(self) -> Tensor:
        """[G] int64: the first of each group's best answers; 0 in a group without a pair."""
        leads = self.beats.any(1) & ~self.beats.any(0)
        index = torch.arange(len(self.group), device=self.group.device).masked_fill(~leads, len(self.group))
        first = index.new_full((self.num_groups,), len(self.group)).scatter_reduce(0, self.group, index, "amin")
        return first.where(self.pairs_by_group > 0, 0)

    def sum_pairs(self, values: Tensor) -> Tensor:
        """[P] -> [G]."""
        return values.new_zeros(self.num_groups).index_add(0, self.group[self.pairs[0]], values)

    def mean_pairs(self, values: Tensor) -> Tensor:
        """[P] -> [G]; 0 in a group without a pair."""
        return self.sum_pairs(values) / self.pairs_by_group.clamp(min=1)

    def sum_answers(self, values: Tensor) -> Tensor:
        """[E] -> [G]."""
        return values.new_zeros(self.num_groups).index_add(0, self.group, values)


def merit_of(batch: Batch) -> Tensor:
    """[E] float64: 0 and -1 of a preference pair's two answers, else the score; NaN where there is none."""
    device = batch.mask.device
    scores = [float("nan") if score is None else score for score in batch.score or [None] * batch.num_sequences]
    merit = torch.tensor(scores, dtype=torch.float64, device=device)
    if batch.rejected is None:
        return merit
    return torch.where(in_pair(batch), -batch.rejected.double(), merit)


def in_pair(batch: Batch) -> Tensor:
    """[E] bool: answers of preference pairs."""
    groups = batch.groups()
    if batch.rejected is None:
        return torch.zeros_like(groups, dtype=torch.bool)
    return torch.isin(groups, groups[batch.rejected])


def answer_logprobs(batch: Batch, logprobs: Tensor | None, length_power: float = 0.0) -> Tensor:
    """[B, T] -> [E]: the sum over an answer's targets / (their number ^ `length_power`): 0 is the sum, 1 the mean."""
    assert logprobs is not None, "the log-probabilities of the targets were not asked for"
    total = batch.sum_by_sequence(logprobs)
    if length_power == 0:
        return total
    return total / batch.targets_by_sequence().clamp(min=1).to(total.dtype) ** length_power


class Ranked(Objective):
    """A loss per group of answers that has at least one pair (better, worse).

    Serves preference pairs and scored groups alike: of a scored group every two answers of unequal score are a pair.
    """

    unit = Unit.GROUP
    scope = Scope.LOGPROBS
    columns = frozenset({"rejected"})

    def units(self, batch: Batch) -> Tensor:
        return Ranking.of(batch).pairs_by_group > 0


class Pairwise(Ranked):
    """A loss of pairs, in a group the mean over its pairs."""

    def forward(self, batch: Batch, student: StudentOutput, teacher: TeacherSignal) -> Tensor:
        ranking = Ranking.of(batch)
        return ranking.mean_pairs(self.pair_loss(batch, student, teacher, *ranking.pairs))

    @abstractmethod
    def pair_loss(
        self, batch: Batch, student: StudentOutput, teacher: TeacherSignal, better: Tensor, worse: Tensor
    ) -> Tensor:
        """Nats [P] of the pairs of sequences (better [P], worse [P])."""
