"""Dual-space distillation with cross-model attention: Zhang et al. 2024 (DSKD-CMA), arXiv:2406.17328, section 3.3."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kdcli.api import Batch, ModelShape, Need, StudentOutput, TeacherSignal
from kdcli.objective._dual_space import DualSpace, wide
from kdcli.objective._spans import Spans, heads, spans_of, teacher_hidden, teacher_targets
from kdcli.ops.chunked import chunk_size, map_chunks


class DSKDCMA(DualSpace):
    """DSKD where the models' hidden states are aligned by attention, and so with any two tokenizers. Per sequence:

        A = Q K^T / sqrt(2 D_t),  Q = P_q [e_s(input) ; e_s(target)],  K = [e_t(input) ; e_t(target)] / std
        the teacher's states at the student's targets:  softmax(A)   P_t2s (h_t + e_t(target)), over the teacher's
        the student's states at the teacher's targets:  softmax(A^T) P_s2t h_s, over the student's

    with e the embeddings, held fixed, and h_t and e_t(target) each divided by its standard deviation. Per target the
    value is CE + D (D only where the teacher's mapped state puts y first) as in DSKD, and an equal share of the sum
    over the teacher's targets of KL(p || softmax(W_t mapped)), so that the sum over a sequence is the official one.

    Departs from the official code: standard deviations and attention are of one sequence's answer, and not of a
    batch with its padding; what lies outside is left out, and not given -1e5; the teacher's targets outside of every
    span are left out; heads are applied whole, with bias, scale and soft-cap. `divergence` and `temperature` as in
    DSKD. Raises ConfigError for a teacher without hidden states.
    """

    needs = Need.LOGITS | Need.HIDDEN  # HIDDEN brings the embeddings

    def fit(self, student: ModelShape, teacher: ModelShape | None) -> None:
        super().fit(student, teacher)
        assert teacher is not None, "the base refuses it"
        self.query = nn.Linear(2 * student.width, 2 * teacher.width)

    def units(self, batch: Batch) -> Tensor:
        return super().units(batch) & _answers(batch, spans_of(batch)).student

    def forward(self, batch: Batch, student: StudentOutput, teacher: TeacherSignal) -> Tensor:
        head, teacher_head = heads(batch, student, teacher, "DSKDCMA")
        assert student.hidden is not None and student.embedding is not None and teacher.embedding is not None
        answers = _answers(batch, spans_of(batch))
        of, teacher_of = answers.sequence, answers.teacher_sequence
        hidden, states = student.hidden[answers.student], teacher_hidden(batch, teacher)[answers.teacher]
        targets = batch.targets[answers.student]

        table, teacher_table = wide(student.embedding.detach()), wide(teacher.embedding)
        index = torch.cat([table[batch.input_ids[answers.student]], table[targets]], -1)
        followed = teacher_table[teacher_targets(batch)[answers.teacher]]
        teacher_index = torch.cat([teacher_table[_teacher_inputs(batch)[answers.teacher]], followed], -1)
        number = batch.num_sequences
        carried = _standardized(wide(states), teacher_of, number) + _standardized(followed, teacher_of, number)

        for_student, for_teacher = _attend(
            self.query(index),
            _standardized(teacher_index, teacher_of, number),
            (self.into_teacher(wide(hidden)), self.into_student(carried)),
            (of, teacher_of),
            number,
        )

        def in_student(h: Tensor, mapped: Tensor, target: Tensor) -> Tensor:
            return self.student_side(head, h, mapped, target, right=True)

        def in_teacher(h: Tensor, mapped: Tensor) -> Tensor:
            return self.teacher_side(teacher_head, h, mapped)

        device = batch.mask.device
        size, teacher_size = (chunk_size(one.vocab_size, device) for one in (head, teacher_head))
        values = map_chunks(in_student, size, hidden, for_student, targets)
        others = map_chunks(in_teacher, teacher_size, states, for_teacher)
        sums = others.new_zeros(number).index_add(0, teacher_of, others)
        values = values + sums[of] / torch.bincount(of, minlength=number)[of]
        return values.new_zeros(batch.mask.shape).masked_scatter(answers.student, values)


@dataclass(frozen=True)
class _Answers:
    student: Tensor  # [B, T] bool: the N targets of sequences that have a span
    teacher: Tensor  # [B, T'] bool: the M targets of the teacher's that are in a span
    sequence: Tensor  # [N] which sequence a target is of
    teacher_sequence: Tensor  # [M]


def _answers(batch: Batch, spans: Spans) -> _Answers:
    of_span = batch.segment.flatten()[spans.first(spans.student)]  # [S]
    has_span = torch.zeros(batch.num_sequences, dtype=torch.bool, device=of_span.device)
    has_span[of_span] = True
    student = batch.mask & has_span[batch.segment.clamp(min=0)]
    teacher = spans.teacher >= 0
    return _Answers(student, teacher, batch.segment[student], of_span[spans.teacher[teacher]])


def _teacher_inputs(batch: Batch) -> Tensor:
    """[B, T'] the ids after which the teacher's targets come."""
    view = batch.teacher
    if view is None:
        return batch.input_ids
    return view.input_ids if view.foreign else view.input_ids.gather(1, view.position.clamp(min=0))


def _standardized(rows: Tensor, of: Tensor, number: int) -> Tensor:
    """Rows [M, D] divided by the standard deviation of all entries of their sequence's rows."""
    width = rows.shape[-1]
    entries = torch.bincount(of, minlength=number).clamp(min=1) * width
    mean = rows.new_zeros(number).index_add(0, of, rows.sum(-1)) / entries
    squares = (rows - mean[of].unsqueeze(-1)).square().sum(-1)
    variance = rows.new_zeros(number).index_add(0, of, squares) / (entries - 1).clamp(min=1)
    return rows * (variance + 1e-12).rsqrt()[of].unsqueeze(-1)  # an embedding of zeros stays one


def _attend(
    query: Tensor, key: Tensor, carried: tuple[Tensor, Tensor], of: tuple[Tensor, Tensor], number: int
) -> tuple[Tensor, Tensor]:
    """What the student's targets [N] take of the teacher's, and the teacher's [M] of the student's, sequence by
    sequence: query [N, 2 D_t], key [M, 2 D_t], carried ([N, D_t], [M, D_s]) -> [N, D_s], [M, D_t]."""
    scale = math.sqrt(key.shape[-1])
    places, found = ([], []), ([], [])
    for sequence in range(number):
        mine, its = ((one == sequence).nonzero().squeeze(-1) for one in of)
        attention = query[mine] @ key[its].T / scale
        for side, weights in enumerate((attention.softmax(1), attention.T.softmax(1))):
            found[side].append(weights @ carried[1 - side][its if side == 0 else mine])
        places[0].append(mine)
        places[1].append(its)
    taken = [torch.cat(parts)[torch.cat(place).argsort()] for parts, place in zip(found, places, strict=True)]
    return taken[0], taken[1]
