"""The suite itself: wrong losses of answers, pairs and scored groups, and who catches them.

Each is a small right loss with one thing changed. The sources are in METHODS sections 0, 3 and 6.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from kdcli.api import Batch, Need, Objective, Scope, StudentOutput, TeacherSignal, Unit
from kdcli.train.conformance.candidate import Candidate
from kdcli.train.conformance.suite import run


class Preference(Objective):
    """-log sigmoid(beta (r_better - r_worse)), r = log pi - log pi_ref summed over the answer: the base."""

    needs = Need.REFERENCE
    unit = Unit.GROUP
    scope = Scope.LOGPROBS
    columns = frozenset({"rejected"})

    def __init__(self, *, beta: float = 0.1, **settings: Any) -> None:
        super().__init__(**settings)
        self.beta = beta

    def units(self, batch: Batch) -> Tensor:
        assert batch.rejected is not None
        return torch.zeros(int(batch.groups().max()) + 1, dtype=torch.bool).index_fill(
            0, batch.groups()[batch.rejected], True
        )

    def forward(self, batch: Batch, student: StudentOutput, teacher: TeacherSignal) -> Tensor:
        return -logsigmoid(self.margin(batch, self.ratios(batch, student, teacher)))

    def ratios(self, batch: Batch, student: StudentOutput, teacher: TeacherSignal) -> Tensor:
        assert student.logprobs is not None and teacher.reference_logprobs is not None
        return batch.sum_by_sequence(student.logprobs - teacher.reference_logprobs)

    def margin(self, batch: Batch, ratios: Tensor) -> Tensor:
        """[E] -> [G]: of each group the better answer's less the worse's."""
        assert batch.rejected is not None
        sign = torch.where(batch.rejected, -1.0, 1.0)
        return self.beta * ratios.new_zeros(len(self.units(batch))).index_add(0, batch.groups(), sign * ratios)

    @staticmethod
    def oracle(batch: Any, student: Any, teacher: Any, *, beta: float) -> Any:
        values = np.full(1 + batch.group_index.max(), np.nan)
        for group in range(len(values)):
            members = np.flatnonzero(batch.group_index == group)
            if len(members) < 2:
                continue
            r = []
            for member in members:
                at = batch.mask & (batch.segment == member)
                r.append(sum(student.logprobs[at]) - sum(teacher.reference_logprobs[at]))
            values[group] = np.log1p(np.exp(-beta * (r[0] - r[1])))
        return values


class PairsSwapped(Preference):
    """The worse answer is preferred: it falls in training like the right loss."""

    def margin(self, batch: Batch, ratios: Tensor) -> Tensor:
        return -super().margin(batch, ratios)


class MeanForSum(Preference):
    """Log-probabilities are averaged over the answer (the IPO of TRL and HALOs beside the papers' sum)."""

    def ratios(self, batch: Batch, student: StudentOutput, teacher: TeacherSignal) -> Tensor:
        return super().ratios(batch, student, teacher) / batch.targets_by_sequence().clamp(min=1)


class ReferenceIgnored(Preference):
    """r is log pi alone."""

    def ratios(self, batch: Batch, student: StudentOutput, teacher: TeacherSignal) -> Tensor:
        assert student.logprobs is not None
        return batch.sum_by_sequence(student.logprobs)


class DividedByPairs(Preference):
    """Divided by the pairs at hand, and so by another number in every micro-batch."""

    def forward(self, batch: Batch, student: StudentOutput, teacher: TeacherSignal) -> Tensor:
        return super().forward(batch, student, teacher) / self.units(batch).sum()


class EverySecondSequence(Preference):
    """Even sequences are taken for the better answers, odd ones for the worse: wrong beside a single answer."""

    def margin(self, batch: Batch, ratios: Tensor) -> Tensor:
        padded = torch.cat([ratios, ratios.new_zeros(len(ratios) % 2)])
        margin = padded[0::2] - padded[1::2]
        return self.beta * torch.cat([margin, margin.new_zeros(len(self.units(batch)))])[: len(self.units(batch))]


class NumberKept(Preference):
    """A number that follows from a setting is computed once: schedules change nothing."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.kept = self.beta

    def margin(self, batch: Batch, ratios: Tensor) -> Tensor:
        return super().margin(batch, ratios) * self.kept / self.beta


class MaskIgnored(Preference):
    """Log-probabilities are summed over a row, prompt and padding included."""

    def ratios(self, batch: Batch, student: StudentOutput, teacher: TeacherSignal) -> Tensor:
        assert student.logprobs is not None and teacher.reference_logprobs is not None
        values = (student.logprobs - teacher.reference_logprobs)[batch.attention_mask]
        segment = batch.segment[batch.attention_mask]
        return values.new_zeros(batch.num_sequences).index_add(0, segment, values)


class RowsForSequences(Preference):
    """A row is taken for a sequence: right until rows are packed."""

    def ratios(self, batch: Batch, student: StudentOutput, teacher: TeacherSignal) -> Tensor:
        assert student.logprobs is not None and teacher.reference_logprobs is not None
        rows = ((student.logprobs - teacher.reference_logprobs) * batch.mask).sum(1)
        return rows if len(rows) == batch.num_sequences else rows.expand(batch.num_sequences)


class Broadcast(Preference):
    """Shapes [G] and [G, 1] are added (the SLiC of HALOs): every pair gets the others' likelihood."""

    def forward(self, batch: Batch, student: StudentOutput, teacher: TeacherSignal) -> Tensor:
        value = super().forward(batch, student, teacher)
        return value - value.unsqueeze(1) * 0.1


class BroadcastAndReduced(Preference):
    """The same, reduced to the right shape again: every pair gets the mean over all."""

    def forward(self, batch: Batch, student: StudentOutput, teacher: TeacherSignal) -> Tensor:
        value = super().forward(batch, student, teacher)
        return (value - value.unsqueeze(1) * 0.1).mean(1)


class LogOfSigmoid(Preference):
    """log(sigmoid(x)) in place of logsigmoid(x): minus infinity where float32 underflows (ORPO's official code)."""

    def forward(self, batch: Batch, student: StudentOutput, teacher: TeacherSignal) -> Tensor:
        return -torch.sigmoid(self.margin(batch, self.ratios(batch, student, teacher))).log()


class Ranking(Objective):
    """sum_{j better than i} max(0, s_i - s_j), s the mean log-probability of an answer's targets: the base."""

    unit = Unit.GROUP
    scope = Scope.LOGPROBS
    columns = frozenset({"score", "group"})

    def units(self, batch: Batch) -> Tensor:
        return torch.bincount(batch.groups()) > 1

    def forward(self, batch: Batch, student: StudentOutput, teacher: TeacherSignal) -> Tensor:
        assert student.logprobs is not None
        s, groups = batch.sum_by_sequence(student.logprobs) / self.lengths(batch), batch.groups()
        score = torch.tensor([float(score or 0) for score in batch.score])
        wrong = (score[:, None] > score) & (groups[:, None] == groups)
        losses = ((s - s[:, None]).relu() * wrong).sum(1)
        return losses.new_zeros(len(self.units(batch))).index_add(0, groups, losses)

    def lengths(self, batch: Batch) -> Tensor:
        return batch.targets_by_sequence().clamp(min=1)

    @staticmethod
    def oracle(batch: Any, student: Any, teacher: Any) -> Any:
        values = np.zeros(1 + batch.group_index.max())
        s = [student.logprobs[batch.mask & (batch.segment == e)].mean() for e in range(len(batch.weight))]
        for i, score in enumerate(batch.score):
            for j, other in enumerate(batch.score):
                if batch.group_index[i] == batch.group_index[j] and (other or 0) > (score or 0):
                    values[batch.group_index[i]] += max(0.0, s[i] - s[j])
        return values


class PaddedLength(Ranking):
    """An answer's length is its row's, padding included (RRHF's in-place `labels[labels == -100] = 0`)."""

    def lengths(self, batch: Batch) -> Tensor:
        return torch.full((batch.num_sequences,), float(batch.mask.shape[1]))


class AcrossGroups(Ranking):
    """Answers to different prompts are ranked against each other."""

    def forward(self, batch: Batch, student: StudentOutput, teacher: TeacherSignal) -> Tensor:
        known, batch.group_index = batch.groups(), torch.zeros(batch.num_sequences, dtype=torch.int64)
        losses = super().forward(batch, student, teacher)
        batch.group_index = known
        return losses[0].expand(int(known.max()) + 1)


class PolicyGradient(Objective):
    """-A log pi with A = log p - log pi held fixed, per target (on-policy distillation): the base."""

    needs = Need.LOGPROBS
    scope = Scope.LOGPROBS
    stops_gradient = True
    falls = False

    def forward(self, batch: Batch, student: StudentOutput, teacher: TeacherSignal) -> Tensor:
        assert student.logprobs is not None and teacher.logprobs is not None
        return -self.advantage(batch, student.logprobs, teacher.logprobs) * student.logprobs

    def advantage(self, batch: Batch, log_pi: Tensor, log_p: Tensor) -> Tensor:
        return (log_p - log_pi).detach()

    @staticmethod
    def oracle(batch: Any, student: Any, teacher: Any) -> Any:
        return (student.logprobs - teacher.logprobs) * student.logprobs


class NoGrad(PolicyGradient):
    """Right: the advantage is computed without a graph in place of being detached."""

    @torch.no_grad()
    def advantage(self, batch: Batch, log_pi: Tensor, log_p: Tensor) -> Tensor:
        return log_p - log_pi


class AdvantageWithGradient(PolicyGradient):
    """The advantage keeps its graph (TRL's MiniLLM)."""

    def advantage(self, batch: Batch, log_pi: Tensor, log_p: Tensor) -> Tensor:
        return log_p - log_pi


class PaddingWhitened(PolicyGradient):
    """Advantages are whitened over all positions of the micro-batch, padding included (MiniLLM)."""

    def advantage(self, batch: Batch, log_pi: Tensor, log_p: Tensor) -> Tensor:
        plain = super().advantage(batch, log_pi, log_p)
        return (plain - plain.mean()) / plain.std()


class RewardSignFlipped(PolicyGradient):
    """What the teacher finds unlikely is rewarded; a surrogate's value tells nobody."""

    def advantage(self, batch: Batch, log_pi: Tensor, log_p: Tensor) -> Tensor:
        return (log_pi - log_p).detach()


PLANTED: dict[type[Objective], set[str]] = {
    PairsSwapped: {"equals_oracle"},
    MeanForSum: {"equals_oracle"},
    ReferenceIgnored: {"equals_oracle"},
    DividedByPairs: {"units_are_independent", "micro_batches_do_not_matter", "two_processes_are_one"},
    EverySecondSequence: {"equals_oracle", "units_are_independent"},
    NumberKept: {"settings_are_read_at_use"},
    MaskIgnored: {"padding_holds_anything"},
    RowsForSequences: {"packing_is_padding", "packing_does_not_matter"},
    Broadcast: {"one_number_per_unit"},
    BroadcastAndReduced: {"units_are_independent", "micro_batches_do_not_matter"},
    LogOfSigmoid: {"saturated_inputs"},
    PaddedLength: {"units_are_independent", "packing_is_padding", "equals_oracle"},
    AcrossGroups: {"units_are_independent", "equals_oracle"},
    AdvantageWithGradient: {"finite_differences"},
    PaddingWhitened: {"padding_holds_anything", "units_are_independent"},
    RewardSignFlipped: {"equals_oracle"},
}


@pytest.mark.parametrize("right", [Preference, Ranking, PolicyGradient, NoGrad], ids=lambda right: right.__name__)
def test_what_the_mistakes_are_made_in_is_right(right: type[Objective]) -> None:
    verdict = run(Candidate.of(right))
    assert not verdict.failures
    assert sum(outcome.applies for outcome in verdict.outcomes) >= 22


@pytest.mark.parametrize("wrong", PLANTED, ids=lambda wrong: wrong.__name__)
def test_a_planted_mistake_is_caught_by_the_check_made_for_it(wrong: type[Objective]) -> None:
    caught = {outcome.check for outcome in run(Candidate.of(wrong), only=PLANTED[wrong]).failures}
    assert caught == PLANTED[wrong], wrong.__doc__
