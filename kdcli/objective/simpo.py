"""Simple preference optimization: Meng et al. 2024 (SimPO), arXiv:2405.14734, eq. 6."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor
from torch.nn.functional import logsigmoid

from kdcli.api import Batch, StudentOutput, TeacherSignal
from kdcli.errors import ConfigError
from kdcli.objective._preference import Pairwise, RankedSettings, answer_logprobs


class SimPO(Pairwise):
    """-log sigmoid(beta (l_better - l_worse) - margin), l the mean log-probability of a target: no reference.

    `margin` is the paper's gamma; the official code and HALOs have `gamma_beta_ratio` = margin / beta, whose defaults
    (beta 2, ratio .25) are ours. In a scored group the mean over its pairs. Raises ConfigError if beta is not positive.
    """

    def __init__(self, *, beta: float = 2.0, margin: float = 0.5, **settings: Unpack[RankedSettings]) -> None:
        super().__init__(**settings)
        if not beta > 0:
            raise ConfigError(f"SimPO: beta is {beta}; set a number above 0, such as 2")
        self.beta = beta
        self.margin = margin

    def pair_loss(
        self, batch: Batch, student: StudentOutput, teacher: TeacherSignal, better: Tensor, worse: Tensor
    ) -> Tensor:
        mean = answer_logprobs(batch, student.logprobs, 1.0)
        return -logsigmoid(self.beta * (mean[better] - mean[worse]) - self.margin)
