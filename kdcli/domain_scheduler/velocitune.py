"""Velocitune: Luo et al. 2024, arXiv:2411.14318."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Unpack

from kdcli.api import DomainLoss
from kdcli.domain_scheduler._adaptive import FirstInterval, Settings
from kdcli.domain_scheduler._floors import mix
from kdcli.domain_scheduler._reference import Reference, Referenced
from kdcli.domain_scheduler._signals import remaining
from kdcli.domain_scheduler._updates import multiplicative
from kdcli.errors import ConfigError


class Velocitune(Referenced):
    """Domains that have more of their way before them are drawn more often, however long that way is:

        V_i = (l_i - l_target_i) / (l_0_i - l_target_i), on held-out rows; 0 where l_0 is not above the target
        p   = (1 - floor) softmax(log p + step_size V) + floor / K

    Unverified: the paper's abstract says that learning velocity between an initial loss and a target predicted by a
    scaling law moves the weights, and that slower domains gain; the formula, the step size and the interval are from
    memory or ours, and the floor is Sheared-LLaMA's. `reference` is the target: a mapping, which the paper predicts
    from a run on a part of the data; the teacher's loss; or `fitted` to this run.
    """

    remembered: ClassVar[tuple[str, ...]] = (*Referenced.remembered, "began")

    def __init__(
        self,
        *,
        horizon: int,
        reference: Reference = "teacher",
        step_size: float = 1.0,
        floor: float = 1e-4,
        interval: int = 100,
        first_interval: FirstInterval = "natural",
        **settings: Unpack[Settings],
    ) -> None:
        super().__init__(
            reference=reference, horizon=horizon, interval=interval, first_interval=first_interval, **settings
        )
        if not 0 <= floor <= 1:
            raise ConfigError(f"domain_scheduler.floor is {floor}; give a share between 0 and 1")
        self.step_size, self.floor = step_size, floor
        self.began: dict[str, float] = {}  # l_0

    def first(self, weights: Mapping[str, float], losses: Mapping[str, DomainLoss]) -> dict[str, float]:
        self.began = self.read(losses, "student")
        return super().first(weights, losses)

    def next(self, losses: Mapping[str, DomainLoss]) -> dict[str, float] | None:
        student = self.read(losses, "student")
        target = self.references(student, losses)
        if target is None:
            return None
        way = remaining(student, self.began or student, target)
        return mix(multiplicative(self.weights, way, self.step_size), self.floor)
