"""Skew forward KL: Ko et al. 2024 (DistiLLM), arXiv:2402.03898."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor

from kdcli.errors import ConfigError
from kdcli.objective._divergence import Divergence, DivergenceSettings
from kdcli.ops import divergence


class SkewKL(Divergence):
    """KL(p || alpha p + (1 - alpha) q): bounded by -log alpha, and forward KL at alpha = 0.

    `alpha` is the teacher's share of the mixture, DistiLLM's `skew_alpha` (`lam` of its `skewed_forward_kl`, which
    leaves out -H(p): the same gradient, another value). Raises ConfigError if alpha is not in [0, 1).
    """

    f_divergence = True

    def __init__(self, *, alpha: float = 0.1, **settings: Unpack[DivergenceSettings]) -> None:
        super().__init__(**settings)
        if not 0 <= alpha < 1:
            raise ConfigError(f"SkewKL: alpha is {alpha}; set the teacher's share of the mixture, in [0, 1)")
        self.alpha = alpha

    def divergence(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return divergence.skew_kl(log_p, log_q, self.alpha)

    def divergence_gradient(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        return divergence.skew_kl_gradient(log_p, log_q, self.alpha)
