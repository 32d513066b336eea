"""Dual-space knowledge distillation: Zhang et al. 2024 (DSKD), arXiv:2406.17328."""

from __future__ import annotations

from torch import Tensor

from kdcli.api import Batch, StudentOutput, TeacherSignal
from kdcli.objective._dual_space import DualSpace, wide
from kdcli.objective._spans import heads, spans_of
from kdcli.ops.chunked import chunk_size, map_chunks


class DSKD(DualSpace):
    """CE(P_t2s h_t W_s, y) + D(sg(P_t2s h_t W_s), q) + KL(p || softmax(W_t P_s2t h_s)), per target y.

    Both models' hidden states are compared under one head, the student's and the teacher's in turn. P_t2s (D_t -> D_s)
    learns from the first part only, through a head that is held fixed; P_s2t (D_s -> D_t) learns beside the student
    from the last. `divergence` is D, the official `kd_objective`, p' || q of forward_kl with p' the mapped teacher's;
    the official loss is 0.5 of this beside a cross_entropy of 0.5 (`kd_rate`).

    With another tokenizer it has a number where one token of either stands for the same bytes after the same text
    (DSKDv2's exact token alignment; DSKD itself needs a shared tokenizer, and dskd_cma aligns the rest). Temperature,
    and its square, belong to the two divergences and not to CE. Departs from the official code, which applies the
    student's weight alone, by applying the whole head: bias, scale and soft-cap. Raises ConfigError for a teacher
    without hidden states.
    """

    def units(self, batch: Batch) -> Tensor:
        return super().units(batch) & spans_of(batch).exact()

    def forward(self, batch: Batch, student: StudentOutput, teacher: TeacherSignal) -> Tensor:
        head, teacher_head = heads(batch, student, teacher, "DSKD")
        assert student.hidden is not None and teacher.hidden is not None, "scope STATES sees hidden states"
        exact = spans_of(batch).exact()

        def both(h: Tensor, teacher_h: Tensor, targets: Tensor) -> Tensor:
            in_student = self.student_side(head, h, self.into_student(wide(teacher_h)), targets, right=False)
            return in_student + self.teacher_side(teacher_head, teacher_h, self.into_teacher(wide(h)))

        size = chunk_size(head.vocab_size + teacher_head.vocab_size, batch.mask.device)
        values = map_chunks(both, size, student.hidden[exact], teacher.hidden[exact], batch.targets[exact])
        return values.new_zeros(batch.mask.shape).masked_scatter(exact, values)
