"""Total variation distance: Wen et al. 2023 (f-distill), arXiv:2307.15190."""

from __future__ import annotations

from torch import Tensor

from kdcli.objective._divergence import Divergence
from kdcli.ops import divergence


class TotalVariation(Divergence):
    """1/2 sum_v |p - q|, in [0, 1]. The gradient vanishes where teacher and student share no mass.

    The same in f-distill's `tvd` and DistillKit's `tvd`, which multiply by T squared (`temperature_scale: t2`).
    """

    f_divergence = True

    def divergence(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return divergence.total_variation(log_p, log_q)

    def divergence_gradient(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        return divergence.total_variation_gradient(log_p, log_q)
