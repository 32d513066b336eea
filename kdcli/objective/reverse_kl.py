"""Reverse KL, KL(student || teacher): Gu et al. 2024 (MiniLLM), arXiv:2306.08543."""

from __future__ import annotations

from torch import Tensor

from kdcli.objective._divergence import Divergence
from kdcli.ops import divergence


class ReverseKL(Divergence):
    """sum_v q (log q - log p): exact over the vocabulary, not a sampled estimate."""

    f_divergence = True

    def divergence(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return divergence.reverse_kl(log_p, log_q)

    def divergence_gradient(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        return divergence.reverse_kl_gradient(log_p, log_q)
