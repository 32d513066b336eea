"""Decoupled knowledge distillation: Zhao et al. 2022 (DKD), arXiv:2203.08679."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor

from kdcli.api import Batch, Need, StudentOutput, TeacherSignal, TokenSettings
from kdcli.errors import ConfigError
from kdcli.objective._tempered import TemperatureScale, Tempered, Vocabulary
from kdcli.ops import divergence


class DKD(Tempered):
    """T^2 (alpha KL of (target, not target) + beta KL among the other tokens); KL(p || q) has beta = 1 - p_target.

    `alpha`, `beta` and `temperature` are mdistiller's `ALPHA`, `BETA` and `T`, with its defaults; TAID's port has
    beta 0.5. Departs from both by leaving the target out exactly, in log space, where they subtract 1000 from its
    logit. Needs the whole vocabulary: raises ConfigError for a teacher that gives top-k only, or for a negative factor.
    """

    needs = Need.LOGITS

    def __init__(
        self,
        *,
        alpha: float = 1.0,
        beta: float = 8.0,
        temperature: float = 4.0,
        temperature_scale: TemperatureScale = "t2",
        vocabulary: Vocabulary = "shared",
        **settings: Unpack[TokenSettings],
    ) -> None:
        super().__init__(
            temperature=temperature, temperature_scale=temperature_scale, vocabulary=vocabulary, **settings
        )
        if not (alpha >= 0 and beta >= 0):
            raise ConfigError(f"DKD: alpha is {alpha} and beta is {beta}; set factors of at least 0")
        self.alpha = alpha
        self.beta = beta

    def forward(self, batch: Batch, student: StudentOutput, teacher: TeacherSignal) -> Tensor:
        log_p, log_q = self.dense_log_p(teacher), student.log_q(self.temperature)
        return self.scale * divergence.decoupled_kl(log_p, log_q, batch.targets, self.alpha, self.beta)

    def closed_form(self, batch: Batch, student: StudentOutput, teacher: TeacherSignal) -> tuple[Tensor, Tensor]:
        log_p, log_q = self.dense_log_p(teacher), student.log_q(self.temperature)
        return self.scaled(*divergence.decoupled_kl_gradient(log_p, log_q, batch.targets, self.alpha, self.beta))
