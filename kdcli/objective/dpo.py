"""Direct preference optimization: Rafailov et al. 2023 (DPO), arXiv:2305.18290, eq. 7."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor
from torch.nn.functional import logsigmoid

from kdcli.api import Batch, StudentOutput, TeacherSignal
from kdcli.errors import ConfigError
from kdcli.objective._preference import Pairwise
from kdcli.objective._reference import Referenced, ReferenceSettings


class DPO(Referenced, Pairwise):
    """-(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h), h = r_better - r_worse, r = log pi - log pi_ref.

    `beta` is the paper's, `label_smoothing` e of cDPO (Mitchell 2023): the share of pairs whose labels are wrong.
    Log-probabilities are summed over an answer as in the paper; DistiLLM-2's "dpkd" takes the mean, which is
    `length_normalize` with `reference: teacher`. In a scored group the mean over its pairs. Starts at log 2 where
    the reference is the student. Raises ConfigError if e is not in [0, 1).
    """

    def __init__(self, *, label_smoothing: float = 0.0, **settings: Unpack[ReferenceSettings]) -> None:
        super().__init__(**settings)
        if not 0 <= label_smoothing < 1:
            raise ConfigError(f"DPO: label_smoothing is {label_smoothing}; set a share in [0, 1)")
        self.label_smoothing = label_smoothing

    def pair_loss(
        self, batch: Batch, student: StudentOutput, teacher: TeacherSignal, better: Tensor, worse: Tensor
    ) -> Tensor:
        ratios = self.log_ratios(batch, student, teacher)
        scaled = self.beta * (ratios[better] - ratios[worse])
        return -(1 - self.label_smoothing) * logsigmoid(scaled) - self.label_smoothing * logsigmoid(-scaled)
