"""Generalized Jensen-Shannon divergence: Agarwal et al. 2024 (GKD), arXiv:2306.13649, eq. 1."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor

from kdcli.errors import ConfigError
from kdcli.objective._divergence import Divergence, DivergenceSettings
from kdcli.ops import divergence


class GeneralizedJSD(Divergence):
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q; beta weights the teacher.

    DistiLLM's `lam` is 1 - beta. At the ends the paper's formula is 0 everywhere, so beta must lie
    strictly between 0 and 1: raises ConfigError, naming forward_kl and reverse_kl.
    """

    f_divergence = True

    def __init__(self, *, beta: float = 0.5, **settings: Unpack[DivergenceSettings]) -> None:
        super().__init__(**settings)
        if not 0 < beta < 1:
            raise ConfigError(
                f"GeneralizedJSD: beta is {beta}, where the divergence is 0 for every student; choose 0 < beta < 1, "
                "or objective forward_kl or reverse_kl"
            )
        self.beta = beta

    def divergence(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return divergence.generalized_jsd(log_p, log_q, self.beta)

    def divergence_gradient(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        return divergence.generalized_jsd_gradient(log_p, log_q, self.beta)
