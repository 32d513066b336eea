"""Universal logit distillation: Boizard et al. 2024 (ULD), arXiv:2402.12030."""

from __future__ import annotations

from torch import Tensor

from kdcli.api import Batch, Need, StudentOutput, TeacherSignal
from kdcli.objective._spans import compared
from kdcli.objective._tempered import Tempered
from kdcli.ops import optimal_transport


class ULD(Tempered):
    """sum_j |sort(q)_j - sort(p)_j|, in [0, 2]: the smaller vocabulary is filled up with zeros.

    It is the Wasserstein distance where every id is equally far from every other, without the paper's cross-entropy
    (add a term cross_entropy; the paper's lambda is this term's weight, 1.5). With another tokenizer it has a number
    at each target whose first byte the teacher predicts at that place too. Departs from the paper and its code, which
    pair the i-th target of one model with the i-th of the other and so compare unlike texts from the first
    difference in cutting on. `temperature` is both `student_temperature` and `teacher_temperature`; the official
    trainer's `skip_student_eos` has no counterpart: the end of a text is learned like any token.
    """

    needs = Need.LOGITS
    cross_tokenizer = True

    def units(self, batch: Batch) -> Tensor:
        return super().units(batch) & compared(batch)

    def forward(self, batch: Batch, student: StudentOutput, teacher: TeacherSignal) -> Tensor:
        p, q = self.dense_log_p(teacher).exp(), student.log_q(self.temperature).exp()
        return self.scale * optimal_transport.sorted_distance(p, q)

    def closed_form(self, batch: Batch, student: StudentOutput, teacher: TeacherSignal) -> tuple[Tensor, Tensor]:
        p, q = self.dense_log_p(teacher).exp(), student.log_q(self.temperature).exp()
        return self.scaled(*optimal_transport.sorted_distance_gradient(p, q))
