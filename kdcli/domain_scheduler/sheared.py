"""Dynamic batch loading of Sheared-LLaMA: Xia et al. 2023, arXiv:2310.06694."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Unpack

from kdcli.api import DomainLoss
from kdcli.domain_scheduler._adaptive import Settings
from kdcli.domain_scheduler._floors import mix
from kdcli.domain_scheduler._reference import Reference, Referenced
from kdcli.domain_scheduler._signals import loss_gap
from kdcli.domain_scheduler._updates import multiplicative
from kdcli.errors import ConfigError


class Sheared(Referenced):
    """Domains that are further from the loss they should reach are drawn more often, so that all arrive together:

        d_i = l_i - l_ref_i, on held-out rows
        p   = (1 - floor) softmax(log p + step_size d) + floor / K

    The reference is what a scaling law of larger models predicts for the student's size (give it as a mapping), the
    model that was pruned (`teacher`), or a law of this run (`fitted`). `first_interval: r0` makes the first update
    right away. The authors' code does not clip d at 0, and this does not; `clip` does (Algorithm 1 of the paper is said
    to, which was not verified). Every 400 steps in continued pre-training, 50 in pruning.
    """

    def __init__(
        self,
        *,
        horizon: int,
        reference: Reference = "teacher",
        clip: bool = False,
        step_size: float = 1.0,
        floor: float = 1e-4,
        interval: int = 400,
        first_interval: Literal["natural", "r0", "uniform"] = "natural",
        **settings: Unpack[Settings],
    ) -> None:
        super().__init__(
            reference=reference, horizon=horizon, interval=interval, first_interval=first_interval, **settings
        )
        if not 0 <= floor <= 1:
            raise ConfigError(f"domain_scheduler.floor is {floor}; give a share between 0 and 1")
        self.clip = clip
        self.step_size = step_size  # eta = 1., llmshearing/callbacks/dynamic_loading_callback.py
        self.floor = floor  # c = 1e-4, the same

    def first(self, weights: Mapping[str, float], losses: Mapping[str, DomainLoss]) -> dict[str, float]:
        weights = super().first(weights, losses)
        if self.first_interval != "r0" or self.reference == "fitted":
            return weights
        self.weights = self.next(losses) or self.weights
        return self.complete(self.weights)

    def next(self, losses: Mapping[str, DomainLoss]) -> dict[str, float] | None:
        student = self.read(losses, "student")
        reference = self.references(student, losses)
        if reference is None:
            return None
        gap = loss_gap(student, reference, clip=self.clip)
        return mix(multiplicative(self.weights, gap, self.step_size), self.floor)
