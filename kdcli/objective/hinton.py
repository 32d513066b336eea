"""Hinton distillation: Hinton et al. 2015, arXiv:1503.02531."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kdcli.objective._divergence import Divergence, TemperatureScale
from kdcli.ops import divergence


class Hinton(Divergence):
    """T^2 KL(p || q) at T = 4: forward KL with the defaults of the paper's followers (RepDistiller's `KD`).

    RepDistiller's `kd_T` is `temperature`; its batch mean is the Distiller's mean over targets.
    """

    f_divergence = True

    def __init__(
        self,
        *,
        weight: float = 1.0,
        domains: Sequence[str] = (),
        temperature: float = 4.0,
        temperature_scale: TemperatureScale = "t2",
    ) -> None:
        super().__init__(weight=weight, domains=domains, temperature=temperature, temperature_scale=temperature_scale)

    def divergence(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return divergence.forward_kl(log_p, log_q)

    def divergence_gradient(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        return divergence.forward_kl_gradient(log_p, log_q)
