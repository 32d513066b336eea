"""Skew forward KL: Ko et al. 2024 (DistiLLM), arXiv:2402.03898."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kdcli.errors import ConfigError
from kdcli.objective._divergence import Divergence, TemperatureScale
from kdcli.ops import divergence


class SkewKL(Divergence):
    """KL(p || alpha p + (1 - alpha) q): bounded by -log alpha, and forward KL at alpha = 0.

    `alpha` is the teacher's share of the mixture, DistiLLM's `skew_alpha` (`lam` of its `skewed_forward_kl`, which
    leaves out -H(p): the same gradient, another value). Raises ConfigError if alpha is not in [0, 1).
    """

    f_divergence = True

    def __init__(
        self,
        *,
        weight: float = 1.0,
        domains: Sequence[str] = (),
        temperature: float = 1.0,
        temperature_scale: TemperatureScale = "none",
        alpha: float = 0.1,
    ) -> None:
        super().__init__(weight=weight, domains=domains, temperature=temperature, temperature_scale=temperature_scale)
        if not 0 <= alpha < 1:
            raise ConfigError(f"SkewKL: alpha is {alpha}; set the teacher's share of the mixture, in [0, 1)")
        self.alpha = alpha

    def divergence(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return divergence.skew_kl(log_p, log_q, self.alpha)

    def divergence_gradient(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        return divergence.skew_kl_gradient(log_p, log_q, self.alpha)
