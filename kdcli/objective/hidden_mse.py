"""Squared distance of hidden states: Romero et al. 2015 (FitNets), arXiv:1412.6550; Jiao et al. 2020 (TinyBERT)."""

from __future__ import annotations

from typing import Literal, Unpack

from torch import Tensor

from kdcli.api import TokenSettings
from kdcli.objective._layers import Layers, rms
from kdcli.objective._projected import Projected


class HiddenMSE(Projected):
    """1/D sum_d (W h_s - h_t)_d^2 per target, mean over pairs of layers; FitNets' regressor and TinyBERT's fit_dense
    (arXiv:1909.10351, eq. 8) are W.

    `normalize`: `teacher` divides by 1/D |h_t|^2, so that layers of other magnitudes count alike and 1 is as good as
    predicting 0; `unit` divides each state by its root mean square first, which gives PKD's squared distance of states
    of length one (arXiv:1908.09355, at every target and not at the first). FitNets' 1/2 is left to `weight`. Departs
    from both in that all layers are matched at once, and in that targets which are not supervised do not count.
    """

    def __init__(
        self,
        *,
        normalize: Literal["none", "teacher", "unit"] = "none",
        layers: Layers = "uniform",
        project: Literal["auto", "always"] = "auto",
        init: str | None = None,
        seed: int = 0,
        **settings: Unpack[TokenSettings],
    ) -> None:
        super().__init__(layers=layers, project=project, init=init, seed=seed, **settings)
        self.normalize = normalize

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        if self.normalize == "unit":
            student, teacher = student / rms(student), teacher / rms(teacher)
        value = (student - teacher).square().mean(-1)
        return value / rms(teacher)[:, 0].square() if self.normalize == "teacher" else value
