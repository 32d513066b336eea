"""Symmetric KL, a weighted sum of forward and reverse: Jeffreys 1946; in language models, torchtune."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor

from kdcli.errors import ConfigError
from kdcli.objective._divergence import Divergence, DivergenceSettings
from kdcli.ops import divergence


class SymmetricKL(Divergence):
    """w KL(p || q) + (1 - w) KL(q || p), w = `forward_weight`, and not the Jensen-Shannon divergence.

    Others' names: torchtune's `sym_kd_ratio` and NeMo-RL's `mixed_kl_weight` are w; DistiLLM's `lam` and verl's
    `rkl_ratio` are 1 - w. DistiLLM and ABKD add a cross-entropy in place of the forward KL, so their values differ
    from ours by w H(p). Raises ConfigError if w is not in [0, 1].
    """

    f_divergence = True

    def __init__(self, *, forward_weight: float = 0.5, **settings: Unpack[DivergenceSettings]) -> None:
        super().__init__(**settings)
        if not 0 <= forward_weight <= 1:
            raise ConfigError(f"SymmetricKL: forward_weight is {forward_weight}; set a share in [0, 1]")
        self.forward_weight = forward_weight

    def divergence(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return divergence.symmetric_kl(log_p, log_q, self.forward_weight)

    def divergence_gradient(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        return divergence.symmetric_kl_gradient(log_p, log_q, self.forward_weight)
