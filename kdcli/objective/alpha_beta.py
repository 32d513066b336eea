"""Alpha-beta divergence: Wang et al. 2025 (ABKD), arXiv:2505.04560; Cichocki et al. 2011."""

from __future__ import annotations

import math
from typing import Unpack

from torch import Tensor

from kdcli.errors import ConfigError
from kdcli.objective._divergence import Divergence, DivergenceSettings
from kdcli.ops import divergence


class AlphaBeta(Divergence):
    """-1/(a b) sum_v [p^a q^b - a/(a+b) p^(a+b) - b/(a+b) q^(a+b)], and its limit where a, b or a + b is 0.

    `alpha` and `beta` are the paper's and the code's: (1, 0) is forward KL, (0, 1) reverse KL, (0.5, 0.5) four times
    the squared Hellinger distance, (0, 0) half the squared log-ratio. Departs from the official code at a = 0, b = 0
    and a + b = 0, whose factors are 1/b, 1/a and 1/a where the limits have their squares. With a negative a or b the
    value has no bound where the supports differ: saturated models overflow. Raises ConfigError if one is not finite.
    """

    def __init__(self, *, alpha: float = 0.2, beta: float = 0.7, **settings: Unpack[DivergenceSettings]) -> None:
        super().__init__(**settings)
        if not (math.isfinite(alpha) and math.isfinite(beta)):
            raise ConfigError(f"AlphaBeta: alpha is {alpha} and beta is {beta}; set finite numbers")
        self.alpha = alpha
        self.beta = beta

    def divergence(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return divergence.alpha_beta(log_p, log_q, self.alpha, self.beta)

    def divergence_gradient(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        return divergence.alpha_beta_gradient(log_p, log_q, self.alpha, self.beta)
