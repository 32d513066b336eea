"""Skew reverse KL: Ko et al. 2024 (DistiLLM), arXiv:2402.03898."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor

from kdcli.errors import ConfigError
from kdcli.objective._divergence import Divergence, DivergenceSettings
from kdcli.ops import divergence


class SkewReverseKL(Divergence):
    """KL(q || (1 - alpha) p + alpha q): bounded by -log alpha, and reverse KL at alpha = 0.

    `alpha` is the student's share of the mixture, DistiLLM's `skew_alpha` (`lam` of its `skewed_reverse_kl`).
    `detach_mixture` sends no gradient through the mixture, as DistiLLM-2 (arXiv:2503.07067) does and DistiLLM does
    not. Raises ConfigError if alpha is not in [0, 1).
    """

    f_divergence = True

    def __init__(
        self, *, alpha: float = 0.1, detach_mixture: bool = False, **settings: Unpack[DivergenceSettings]
    ) -> None:
        super().__init__(**settings)
        if not 0 <= alpha < 1:
            raise ConfigError(f"SkewReverseKL: alpha is {alpha}; set the student's share of the mixture, in [0, 1)")
        self.alpha = alpha
        self.detach_mixture = detach_mixture
        self.stops_gradient = detach_mixture

    def divergence(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return divergence.skew_reverse_kl(log_p, log_q, self.alpha, self.detach_mixture)

    def divergence_gradient(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        return divergence.skew_reverse_kl_gradient(log_p, log_q, self.alpha, self.detach_mixture)
