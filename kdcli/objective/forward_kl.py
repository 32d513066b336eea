"""Forward KL, KL(teacher || student): Hinton et al. 2015, arXiv:1503.02531."""

from __future__ import annotations

from torch import Tensor

from kdcli.objective._divergence import Divergence
from kdcli.ops import divergence


class ForwardKL(Divergence):
    """sum_v p (log p - log q): the full divergence, zero at p = q (not the cross-entropy some call KL)."""

    f_divergence = True

    def divergence(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return divergence.forward_kl(log_p, log_q)

    def divergence_gradient(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        return divergence.forward_kl_gradient(log_p, log_q)
