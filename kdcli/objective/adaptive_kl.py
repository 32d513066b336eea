"""Adaptive KL: Wu et al. 2024 (AKL), arXiv:2404.02657."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor

from kdcli.errors import ConfigError
from kdcli.objective._divergence import Divergence, DivergenceSettings
from kdcli.ops import divergence


class AdaptiveKL(Divergence):
    """w KL(p || q) + (1 - w) KL(q || p), w = the share of |p - q| that lies on the teacher's head, held fixed.

    The head is the teacher's likeliest tokens while their probabilities add up to at most `mu` (the paper's and the
    code's mu), the first always among them; the rest is the tail. As in the official code no gradient goes through w.
    Departs from it at p = q, where w is 0 / 0 there and 1/2 here. Sorts the vocabulary. Raises ConfigError if mu is
    not in (0, 1).
    """

    stops_gradient = True

    def __init__(self, *, mu: float = 0.5, **settings: Unpack[DivergenceSettings]) -> None:
        super().__init__(**settings)
        if not 0 < mu < 1:
            raise ConfigError(f"AdaptiveKL: mu is {mu}; set the head's probability, in (0, 1)")
        self.mu = mu

    def divergence(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return divergence.adaptive_kl(log_p, log_q, self.mu)

    def divergence_gradient(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        return divergence.adaptive_kl_gradient(log_p, log_q, self.mu)
