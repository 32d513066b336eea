"""Mean squared error of logits: Ba & Caruana 2014, arXiv:1312.6184."""

from __future__ import annotations

from torch import Tensor

from kdcli.api import Batch, Need, StudentOutput, TeacherSignal
from kdcli.objective._tempered import Tempered
from kdcli.ops import divergence


class LogitMSE(Tempered):
    """mean_v ((z_v - mean z) - (y_v - mean y))^2 / T^2.

    Departs from TextBrewer's `kd_mse_loss` (`temperature` is its `temperature`) and from the paper by centring the
    logits of a token first: a softmax does not see a common offset, and neither does this loss. `temperature_scale:
    t2` makes T cancel. Needs the whole vocabulary: raises ConfigError for a teacher that gives top-k only.
    """

    needs = Need.LOGITS

    def forward(self, batch: Batch, student: StudentOutput, teacher: TeacherSignal) -> Tensor:
        return self.scale * divergence.logit_mse(self.dense_log_p(teacher), student.log_q(self.temperature))

    def closed_form(self, batch: Batch, student: StudentOutput, teacher: TeacherSignal) -> tuple[Tensor, Tensor]:
        log_p, log_q = self.dense_log_p(teacher), student.log_q(self.temperature)
        return self.scaled(*divergence.logit_mse_gradient(log_p, log_q))
