"""Hinton distillation: Hinton et al. 2015, arXiv:1503.02531."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor

from kdcli.api import TokenSettings
from kdcli.objective._divergence import Divergence
from kdcli.objective._tempered import TemperatureScale, Vocabulary
from kdcli.ops import divergence
from kdcli.ops.support import Missing


class Hinton(Divergence):
    """T^2 KL(p || q) at T = 4: forward KL with the defaults of the paper's followers (RepDistiller's `KD`).

    RepDistiller's `kd_T` is `temperature`; its batch mean is the Distiller's mean over targets.
    """

    f_divergence = True

    def __init__(
        self,
        *,
        temperature: float = 4.0,
        temperature_scale: TemperatureScale = "t2",
        vocabulary: Vocabulary = "shared",
        missing: Missing = "tail",
        **settings: Unpack[TokenSettings],
    ) -> None:
        super().__init__(
            temperature=temperature,
            temperature_scale=temperature_scale,
            vocabulary=vocabulary,
            missing=missing,
            **settings,
        )

    def divergence(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return divergence.forward_kl(log_p, log_q)

    def divergence_gradient(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        return divergence.forward_kl_gradient(log_p, log_q)
