"""Sequence likelihood calibration: Zhao et al. 2023 (SLiC-HF), arXiv:2305.10425."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor

from kdcli.api import Batch, StudentOutput, TeacherSignal
from kdcli.errors import ConfigError
from kdcli.objective._preference import Pairwise, RankedSettings, answer_logprobs


class SLiC(Pairwise):
    """max(0, margin - log pi(better) + log pi(worse)) - sft_weight log pi(better).

    `margin` is the paper's delta and `sft_weight` its lambda, with HALOs' `lambda_coef` of .1. The paper's fine-tuning
    target y_ref is the better answer here, as in HALOs, whose code adds a [N] to a [N, T] by broadcasting. Sums
    log-probabilities over an answer; `length_normalize` takes the mean over its targets, in both parts. In a scored
    group the mean over its pairs. Raises ConfigError for a negative margin or weight.
    """

    def __init__(
        self,
        *,
        margin: float = 1.0,
        sft_weight: float = 0.1,
        length_normalize: bool = False,
        **settings: Unpack[RankedSettings],
    ) -> None:
        super().__init__(**settings)
        for name, value in (("margin", margin), ("sft_weight", sft_weight)):
            if not value >= 0:
                raise ConfigError(f"SLiC: {name} is {value}; set a number of at least 0")
        self.margin = margin
        self.sft_weight = sft_weight
        self.length_normalize = length_normalize

    def pair_loss(
        self, batch: Batch, student: StudentOutput, teacher: TeacherSignal, better: Tensor, worse: Tensor
    ) -> Tensor:
        log_pi = answer_logprobs(batch, student.logprobs, 1.0 if self.length_normalize else 0.0)
        return (self.margin - log_pi[better] + log_pi[worse]).relu() - self.sft_weight * log_pi[better]
