"""Remaining gap x velocity: D3-MOPD 2026, arXiv:2608.24987."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from kdcli.api import DomainLoss
from kdcli.domain_scheduler._adaptive import Actuator, Adaptive, FirstInterval, Quota
from kdcli.domain_scheduler._floors import fitting, mix
from kdcli.domain_scheduler._signals import descent, ema, over_largest, product, ratio_to_start
from kdcli.domain_scheduler._updates import softmax
from kdcli.errors import ConfigError


class Gap(Adaptive):
    """Domains that are both far from the teacher and coming closer are drawn more often:

        gap      = EMA of KL_now / max(KL at the beginning, least_kl)
        velocity = mean relative fall of that EMA over the last `windows` updates, 0 where it rises
        p        = floor + (1 - K floor) softmax(gap velocity / their largest / temperature)

    KL(teacher || student) is in nats per target, on held-out rows. Weights stay until two updates have been made.

    Settings are those of the paper's Table 3 as two re-implementations give them; the formula is theirs too, not seen
    in the authors' code. Departs from them: KL is the probe's, once per update, and not the training batch's in
    every step, so a window is one update, the beginning is the probe before the first step and not the mean of five
    steps, and `decay` is that of their average over 10 steps seen every 10, (9/11)^10; batches are not jittered.

    Raises ConfigError where `floor` for each domain is more than there is.
    """

    signals = frozenset({"kl"})
    remembered: ClassVar[tuple[str, ...]] = ("began", "history")

    def __init__(
        self,
        *,
        temperature: float = 0.5,
        floor: float = 0.10,
        least_kl: float = 0.15,
        windows: int = 3,
        decay: float = 0.134,
        interval: int = 10,
        first_interval: FirstInterval = "uniform",
        actuator: Actuator = "resample",
        quota: Quota = "hamilton",
    ) -> None:
        super().__init__(interval=interval, first_interval=first_interval, actuator=actuator, quota=quota)
        if temperature <= 0 or least_kl <= 0 or windows < 1 or not 0 <= decay < 1 or floor < 0:
            raise ConfigError(
                f"domain_scheduler: Gap has temperature={temperature}, least_kl={least_kl}, windows={windows}, "
                f"decay={decay}, floor={floor}; the first three must be above 0, decay in [0, 1), floor at least 0"
            )
        self.temperature, self.floor, self.least_kl = temperature, floor, least_kl
        self.windows, self.decay = windows, decay
        self.began: dict[str, float] = {}
        self.history: list[dict[str, float]] = []  # of the EMA, oldest first

    def begin(self) -> None:
        fitting(self.floor, len(self.natural), "floor")
        self.began, self.history = {}, []

    def first(self, weights: Mapping[str, float], losses: Mapping[str, DomainLoss]) -> dict[str, float]:
        self.began = self.read(losses, "kl")
        self.history = [self.began]
        return super().first(weights, losses)

    def next(self, losses: Mapping[str, DomainLoss]) -> dict[str, float] | None:
        kl = self.read(losses, "kl")
        self.began = self.began or kl
        smooth = ema(self.history[-1] if self.history else None, kl, self.decay)
        self.history = [*self.history, smooth][-self.windows - 1 :]
        if self.updates < 2:
            return None
        gap, velocity = ratio_to_start(smooth, self.began, self.least_kl), descent(self.history, self.least_kl)
        signal = over_largest(product(gap, velocity))
        return mix(softmax(signal, self.temperature), len(signal) * self.floor)
