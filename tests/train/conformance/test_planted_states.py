"""The suite itself: wrong losses of what the layers computed, and of models with different tokenizers.

Each is a small right loss with one thing changed. The sources are in METHODS sections 0, 4, 5 and 6.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kdcli.api import Batch, ModelShape, Need, Objective, Scope, StudentOutput, TeacherSignal, Unit
from kdcli.objective._tempered import Tempered
from kdcli.ops.head import Head
from kdcli.train.conformance.candidate import Candidate
from kdcli.train.conformance.suite import run


class HiddenMSE(Objective):
    """Mean square of W h_s - h_t of the last layers, W learned: the base."""

    needs = Need.HIDDEN
    scope = Scope.STATES

    def fit(self, student: ModelShape, teacher: ModelShape | None) -> None:
        assert teacher is not None
        self.map = nn.Linear(student.width, teacher.width, bias=False)

    def forward(self, batch: Batch, student: StudentOutput, teacher: TeacherSignal) -> Tensor:
        assert student.hidden_states is not None and teacher.hidden_states is not None
        return self.compared(batch, self.map(student.hidden_states[-1].float()), teacher.hidden_states[-1].float())

    def compared(self, batch: Batch, ours: Tensor, theirs: Tensor) -> Tensor:
        return (ours - theirs).square().mean(-1)

    @staticmethod
    def oracle(batch: Any, student: Any, teacher: Any, *, parameters: Any) -> Any:
        values = np.full(batch.mask.shape, np.nan)
        for place in zip(*np.nonzero(batch.mask), strict=True):
            mapped = parameters["map.weight"] @ student.hidden_states[-1][place]
            values[place] = np.mean((mapped - teacher.hidden_states[-1][place]) ** 2)
        return values


class WrongLayer(HiddenMSE):
    """The embedding is taken for layer 0: every layer is one too early."""

    def forward(self, batch: Batch, student: StudentOutput, teacher: TeacherSignal) -> Tensor:
        assert student.hidden_states is not None and teacher.hidden_states is not None
        return self.compared(batch, self.map(student.hidden_states[-2].float()), teacher.hidden_states[-2].float())


class PaddingAveraged(HiddenMSE):
    """The mean over all positions of a row, prompt and padding included, for each of its targets (TED)."""

    def compared(self, batch: Batch, ours: Tensor, theirs: Tensor) -> Tensor:
        return super().compared(batch, ours, theirs).mean(1, keepdim=True).expand(batch.mask.shape)


class BatchNormalised(HiddenMSE):
    """The teacher's states are divided by their root mean square in the micro-batch (DSKD's attention)."""

    def compared(self, batch: Batch, ours: Tensor, theirs: Tensor) -> Tensor:
        return super().compared(batch, ours, theirs / theirs[batch.mask].square().mean().sqrt())


class FrozenMap(HiddenMSE):
    """The projection gets no gradient: what it learns, it does not learn."""

    def forward(self, batch: Batch, student: StudentOutput, teacher: TeacherSignal) -> Tensor:
        assert student.hidden_states is not None and teacher.hidden_states is not None
        ours = nn.functional.linear(student.hidden_states[-1].float(), self.map.weight.detach())
        return self.compared(batch, ours, teacher.hidden_states[-1].float())


class MapLost(HiddenMSE):
    """The projection is not part of what is saved."""

    def state_dict(self, *arguments: Any, **settings: Any) -> dict[str, Any]:
        return {}

    def load_state_dict(self, *arguments: Any, **settings: Any) -> None:  # type: ignore[override]
        pass


class InSixteenBit(HiddenMSE):
    """The difference of large numbers in bfloat16."""

    def compared(self, batch: Batch, ours: Tensor, theirs: Tensor) -> Tensor:
        return super().compared(batch, ours.bfloat16(), theirs.bfloat16()).to(ours.dtype)


class TargetWithGradient(HiddenMSE):
    """Says that it holds its target fixed, and does not."""

    stops_gradient = True

    def compared(self, batch: Batch, ours: Tensor, theirs: Tensor) -> Tensor:
        return super().compared(batch, ours, theirs)


class QueryRelations(Objective):
    """KL of what each position's query says of the queries before it in its sequence (MiniLM): the base."""

    needs = Need.RELATIONS
    scope = Scope.STATES
    zero_at_teacher = True

    def forward(self, batch: Batch, student: StudentOutput, teacher: TeacherSignal) -> Tensor:
        assert student.relations is not None and teacher.relations is not None
        log_q, log_p = (self.related(batch, one[-1].queries.float()) for one in (student.relations, teacher.relations))
        kept = log_p.exp() > 0
        return torch.where(kept, log_p.exp() * (log_p - log_q).masked_fill(~kept, 0.0), 0.0).sum(-1)

    def related(self, batch: Batch, queries: Tensor) -> Tensor:
        """[B, T, H, D / H] -> [B, T, T] log-probabilities."""
        flat = queries.flatten(2)
        scores = flat @ flat.transpose(1, 2) / math.sqrt(flat.shape[-1])
        seen = self.seen(batch) | torch.eye(scores.shape[-1], dtype=torch.bool)
        return torch.log_softmax(scores.masked_fill(~seen, -math.inf), -1)

    def seen(self, batch: Batch) -> Tensor:
        segment, place = batch.segment, torch.arange(batch.segment.shape[1])
        return (place[:, None] >= place) & (segment[:, :, None] == segment[:, None])

    @staticmethod
    def oracle(batch: Any, student: Any, teacher: Any) -> Any:
        values = np.full(batch.mask.shape, np.nan)
        for b, t in zip(*np.nonzero(batch.mask), strict=True):
            rows = []
            for model in (student, teacher):
                queries = model.relations[-1].queries[b].reshape(batch.mask.shape[1], -1)
                keys = [k for k in range(t + 1) if batch.segment[b, k] == batch.segment[b, t]]
                scores = np.array([queries[t] @ queries[k] / np.sqrt(queries.shape[1]) for k in keys])
                rows.append(scores - scores.max() - np.log(np.exp(scores - scores.max()).sum()))
            values[b, t] = np.exp(rows[1]) @ (rows[1] - rows[0])
        return values


class NotCausal(QueryRelations):
    """Every position of the row is compared, as in an encoder: those after it, and the padding."""

    def seen(self, batch: Batch) -> Tensor:
        return torch.ones(*batch.mask.shape, batch.mask.shape[1], dtype=torch.bool)


class AcrossSequences(QueryRelations):
    """Causal in a row: right until rows are packed."""

    def seen(self, batch: Batch) -> Tensor:
        place = torch.arange(batch.mask.shape[1])
        return (place[:, None] >= place).expand(*batch.mask.shape, -1)


class CKA(Objective):
    """1 - linear CKA of the sequence's centred states: the base."""

    needs = Need.HIDDEN
    unit = Unit.SEQUENCE
    scope = Scope.STATES

    def forward(self, batch: Batch, student: StudentOutput, teacher: TeacherSignal) -> Tensor:
        assert student.hidden_states is not None and teacher.hidden_states is not None
        values = []
        for number in range(batch.num_sequences):
            kept = batch.mask & self.together(batch, number)
            values.append(self.unlike(*(one.hidden_states[-1][kept].float() for one in (student, teacher))))
        return torch.stack(values)

    def together(self, batch: Batch, number: int) -> Tensor:
        return batch.segment == number

    def unlike(self, x: Tensor, y: Tensor) -> Tensor:
        if not len(x):
            return x.sum()
        x, y = x - x.mean(0), y - y.mean(0)
        return 1 - (y.T @ x).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm())

    @staticmethod
    def oracle(batch: Any, student: Any, teacher: Any) -> Any:
        values = []
        for number in range(len(batch.weight)):
            at = batch.mask & (batch.segment == number)
            k, l = ((c := h[at] - h[at].mean(0)) @ c.T for h in (student.hidden_states[-1], teacher.hidden_states[-1]))  # noqa: E741
            values.append(1 - np.sum(k * l) / np.sqrt(np.sum(k * k) * np.sum(l * l)))
        return np.array(values)


class CoupledCKA(CKA):
    """Over the whole micro-batch, as papers have it: another number with every cut."""

    def together(self, batch: Batch, number: int) -> Tensor:
        return torch.ones_like(batch.mask)


class Spans(Objective):
    """(log p(span) - log q(span))^2 per span of text that both tokenizers cut alike: the base."""

    needs = Need.LOGPROBS
    scope = Scope.LOGPROBS
    cross_tokenizer = True
    zero_at_teacher = True

    def units(self, batch: Batch) -> Tensor:
        if batch.teacher is None or batch.teacher.span is None:
            return batch.mask
        return batch.teacher.position >= 0

    def forward(self, batch: Batch, student: StudentOutput, teacher: TeacherSignal) -> Tensor:
        view, ours = batch.teacher, student.logprobs
        assert ours is not None
        if view is None or view.span is None or view.teacher_span is None:
            assert teacher.logprobs is not None
            return (ours - teacher.logprobs).square()
        theirs = teacher.own_logprobs
        assert theirs is not None
        size = 1 + int(max(view.span.max(), view.teacher_span.max()))
        known, their = self.kept(batch), view.teacher_span >= 0
        q = ours.new_zeros(size).index_add(0, view.span[known], ours[known])
        p = theirs.new_zeros(size).index_add(0, view.teacher_span[their], theirs[their])
        return self.spread(batch, (p - q).square())

    def kept(self, batch: Batch) -> Tensor:
        assert batch.teacher is not None and batch.teacher.span is not None
        return (batch.teacher.span >= 0) & batch.mask

    def spread(self, batch: Batch, values: Tensor) -> Tensor:
        assert batch.teacher is not None and batch.teacher.span is not None
        return values[batch.teacher.span.clamp(min=0)]

    @staticmethod
    def oracle(batch: Any, student: Any, teacher: Any) -> Any:
        view = batch.teacher
        if view is None:
            return (student.logprobs - teacher.logprobs) ** 2
        values = np.full(batch.mask.shape, np.nan)
        for place in zip(*np.nonzero(view.position >= 0), strict=True):
            number = view.span[place]
            q = sum(student.logprobs[batch.mask & (view.span == number)])
            p = sum(teacher.own_logprobs[view.teacher_span == number])
            values[place] = (p - q) ** 2
        return values


class FirstTokenOnly(Spans):
    """Of a span of several tokens only the first is scored: positions are compared and not texts."""

    def kept(self, batch: Batch) -> Tensor:
        assert batch.teacher is not None
        return (batch.teacher.position >= 0) & batch.mask


class Shifted(Spans):
    """Each span gets the number of the one behind it (GOLD's unshifted logits)."""

    def spread(self, batch: Batch, values: Tensor) -> Tensor:
        return super().spread(batch, values.roll(-1))


class SortedVocabularies(Tempered):
    """sum_j |sort(q)_j - sort(p)_j| at the positions that both models predict from (ULD): the base."""

    needs = Need.LOGITS
    scope = Scope.STATES
    cross_tokenizer = True

    def units(self, batch: Batch) -> Tensor:
        return batch.mask if batch.teacher is None else batch.teacher.position >= 0

    def forward(self, batch: Batch, student: StudentOutput, teacher: TeacherSignal) -> Tensor:
        assert student.head is not None and student.hidden is not None and student.hidden.dim() == 3
        assert teacher.head is not None and teacher.hidden is not None
        q, p = (self.sorted(self.probabilities(head, h)) for head, h in self.models(student, teacher))
        size = max(q.shape[-1], p.shape[-1])
        q, p = (nn.functional.pad(one, (0, size - one.shape[-1])) for one in (q, p))
        return self.scale * (q - p).abs().sum(-1)

    def models(self, student: StudentOutput, teacher: TeacherSignal) -> list[tuple[Head, Tensor]]:
        return [(model.head, model.hidden) for model in (student, teacher)]  # pyright: ignore

    def probabilities(self, head: Head, hidden: Tensor) -> Tensor:
        return torch.softmax(head(hidden) / self.temperature, -1)

    def sorted(self, probabilities: Tensor) -> Tensor:
        return probabilities.sort(dim=-1, descending=True, stable=True).values

    @staticmethod
    def oracle(batch: Any, student: Any, teacher: Any, *, temperature: float, temperature_scale: str) -> Any:
        values = np.full(batch.mask.shape, np.nan)
        for place in zip(*np.nonzero(batch.mask), strict=True):
            found = []
            for model in (student, teacher):
                size = model.head.vocab_size
                z = (model.head.weight[:size] @ model.hidden[place] + model.head.bias[:size]) / temperature
                found.append(sorted(np.exp(z - z.max()) / np.exp(z - z.max()).sum(), reverse=True))
            size = max(map(len, found))
            q, p = (one + [0.0] * (size - len(one)) for one in found)
            values[place] = sum(abs(a - b) for a, b in zip(q, p, strict=True))
        return values * (temperature**2 if temperature_scale == "t2" else 1.0)


class Unsorted(SortedVocabularies):
    """Compared id by id, though ids mean different tokens."""

    def sorted(self, probabilities: Tensor) -> Tensor:
        return probabilities


class PaddedRows(SortedVocabularies):
    """The rows of an embedding that are no tokens take part in the softmax."""

    def probabilities(self, head: Head, hidden: Tensor) -> Tensor:
        return super().probabilities(replace(head, vocab_size=len(head.weight)), hidden)


class OneSidedTemperature(SortedVocabularies):
    """The teacher's logits are not divided by T."""

    def models(self, student: StudentOutput, teacher: TeacherSignal) -> list[tuple[Head, Tensor]]:
        (head, hidden), (their_head, theirs) = super().models(student, teacher)
        return [(head, hidden), (replace(their_head, scale=their_head.scale * self.temperature), theirs)]


class T2InValue(SortedVocabularies):
    """T squared multiplies the value and not the gradient."""

    def forward(self, batch: Batch, student: StudentOutput, teacher: TeacherSignal) -> Tensor:
        scaled = super().forward(batch, student, teacher)
        return scaled / self.scale + (scaled - scaled / self.scale).detach()


class WritesProbabilities(SortedVocabularies):
    """Overwrites what other objectives read (ULD's official code puts probabilities into the logits)."""

    def forward(self, batch: Batch, student: StudentOutput, teacher: TeacherSignal) -> Tensor:
        values = super().forward(batch, student, teacher)
        assert teacher.hidden is not None
        teacher.hidden.mul_(2.0)
        return values


PLANTED: dict[type[Objective], set[str]] = {
    WrongLayer: {"equals_oracle"},
    PaddingAveraged: {"padding_holds_anything", "packing_is_padding", "equals_oracle"},
    BatchNormalised: {"units_are_independent", "micro_batches_do_not_matter"},
    FrozenMap: {"finite_differences"},
    MapLost: {"state_is_restored"},
    InSixteenBit: {"equals_oracle"},
    TargetWithGradient: {"finite_differences"},
    NotCausal: {"equals_oracle", "padding_holds_anything", "packing_is_padding"},
    AcrossSequences: {"packing_is_padding", "packing_does_not_matter"},
    CoupledCKA: {"units_are_independent", "micro_batches_do_not_matter", "ranks_do_not_matter"},
    FirstTokenOnly: {"equals_oracle"},
    Shifted: {"equals_oracle"},
    Unsorted: {"equals_oracle"},
    PaddedRows: {"padded_vocabulary", "equals_oracle"},
    OneSidedTemperature: {"temperature_divides_both_logits"},
    T2InValue: {"t2_scales_value_and_gradient", "finite_differences"},
    WritesProbabilities: {"inputs_stay_as_they_are"},
}
BASES = (HiddenMSE, QueryRelations, CKA, Spans, SortedVocabularies)


@pytest.mark.parametrize("right", BASES, ids=lambda right: right.__name__)
def test_what_the_mistakes_are_made_in_is_right(right: type[Objective]) -> None:
    verdict = run(Candidate.of(right))
    assert not verdict.failures
    assert sum(outcome.applies for outcome in verdict.outcomes) >= 22


@pytest.mark.parametrize("wrong", PLANTED, ids=lambda wrong: wrong.__name__)
def test_a_planted_mistake_is_caught_by_the_check_made_for_it(wrong: type[Objective]) -> None:
    caught = {outcome.check for outcome in run(Candidate.of(wrong), only=PLANTED[wrong]).failures}
    assert caught == PLANTED[wrong], wrong.__doc__
