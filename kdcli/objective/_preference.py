"""Which answers of a group are better than which others, and the interface of losses of such pairs.

Letters: P pairs (better, worse) of one group, G groups, E sequences.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Unpack

import torch
from torch import Tensor

from kdcli.api import Batch, Objective, Scope, Settings, StudentOutput, TeacherSignal, Unit
from kdcli.errors import ConfigError

Answers = Literal["pairs", "scores"]

COLUMNS = {"pairs": frozenset({"rejected"}), "scores": frozenset({"score", "group"})}


@dataclass(frozen=True)
class Ranking:
    """The answers of a micro-batch in the order that the data give within each group.

    An answer of unknown merit, or that cannot be used, is in no pair, and neither are two answers of equal merit.
    """

    merit: Tensor  # [E] float64, NaN where the data do not say
    group: Tensor  # [E] int64
    usable: Tensor  # [E] bool

    @classmethod
    def of(cls, batch: Batch, answers: Answers, usable: Tensor | None = None) -> Ranking:
        """`usable` [E] bool: answers that a loss has a number for; by default those with a supervised target."""
        if usable is None:
            usable = batch.targets_by_sequence() > 0
        return cls(merit_of(batch, answers), batch.groups(), usable)

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


def merit_of(batch: Batch, answers: Answers) -> Tensor:
    """[E] float64, of `pairs` 0 and -1 for the better and the worse answer of a preference pair, of `scores` the score
    of any other sequence; NaN for what is neither."""
    unknown = torch.full((batch.num_sequences,), float("nan"), dtype=torch.float64, device=batch.mask.device)
    groups, rejected = batch.groups(), batch.rejected
    paired = torch.zeros_like(groups, dtype=torch.bool) if rejected is None else torch.isin(groups, groups[rejected])
    if answers == "pairs":
        return unknown if rejected is None else torch.where(paired, -rejected.double(), unknown)
    scores = [float("nan") if score is None else score for score in batch.score]
    return torch.where(paired, unknown, torch.tensor(scores or unknown.tolist()).to(unknown))


def answer_logprobs(batch: Batch, logprobs: Tensor | None, length_power: float = 0.0) -> Tensor:
    """[B, T] -> [E]: the sum over an answer's targets / (their number ^ `length_power`): 0 is the sum, 1 the mean."""
    assert logprobs is not None, "the log-probabilities of the targets were not asked for"
    total = batch.sum_by_sequence(logprobs)
    if length_power == 0:
        return total
    return total / batch.targets_by_sequence().clamp(min=1).to(total.dtype) ** length_power


class RankedSettings(Settings, total=False):
    """Settings of every loss of answers that the data compare."""

    answers: Answers


class Ranked(Objective):
    """A loss per group of answers that has at least one pair (better, worse).

    `answers`: `pairs`, the two answers of a preference row (`chosen`, `rejected`); `scores`, the rows of equal `group`
    with a `score`, of which every two of unequal score are a pair.
    """

    unit = Unit.GROUP
    scope = Scope.LOGPROBS
    columns = COLUMNS["pairs"]  # as composed without settings; an instance's follow `answers`

    def __init__(self, *, answers: Answers = "pairs", **settings: Unpack[Settings]) -> None:
        super().__init__(**settings)
        if answers not in COLUMNS:
            raise ConfigError(f"{type(self).__name__}: answers is {answers!r}; set pairs or scores")
        self.answers: Answers = answers
        self.columns = COLUMNS[answers]

    def ranking(self, batch: Batch) -> Ranking:
        """The answers that this loss compares."""
        return Ranking.of(batch, self.answers)

    def units(self, batch: Batch) -> Tensor:
        return self.ranking(batch).pairs_by_group > 0


class Pairwise(Ranked):
    """A loss of pairs, in a group the mean over its pairs."""

    def forward(self, batch: Batch, student: StudentOutput, teacher: TeacherSignal) -> Tensor:
        ranking = self.ranking(batch)
        return ranking.mean_pairs(self.pair_loss(batch, student, teacher, *ranking.pairs))

    @abstractmethod
    def pair_loss(
        self, batch: Batch, student: StudentOutput, teacher: TeacherSignal, better: Tensor, worse: Tensor
    ) -> Tensor:
        """Nats [P] of the pairs of sequences (better [P], worse [P])."""
