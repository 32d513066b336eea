"""Identity preference optimization: Azar et al. 2023 (IPO), arXiv:2310.12036, eq. 17."""

from __future__ import annotations

from torch import Tensor

from kdcli.api import Batch, StudentOutput, TeacherSignal
from kdcli.objective._preference import Pairwise
from kdcli.objective._reference import Referenced


class IPO(Referenced, Pairwise):
    """(h - 1 / (2 beta))^2, h = r_better - r_worse, r = log pi - log pi_ref: a margin to reach, not to exceed.

    `beta` is the paper's tau. Sums log-probabilities over an answer, as the paper and the original code do; TRL and
    HALOs take the mean over its targets (`length_normalize`). In a scored group the mean over its pairs.
    """

    def pair_loss(
        self, batch: Batch, student: StudentOutput, teacher: TeacherSignal, better: Tensor, worse: Tensor
    ) -> Tensor:
        ratios = self.log_ratios(batch, student, teacher)
        return (ratios[better] - ratios[worse] - 1 / (2 * self.beta)).square()
