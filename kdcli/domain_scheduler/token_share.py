"""Loss weights that give each domain its share of the targets: Open-MOPD 2026, arXiv:2608.19098."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, Unpack

from kdcli.api import DomainLoss
from kdcli.domain_scheduler._adaptive import Actuator, Adaptive, FirstInterval, QuotaSettings
from kdcli.domain_scheduler._reference import covers
from kdcli.domain_scheduler._signals import clamp, ema, ratio_to_start
from kdcli.domain_scheduler._updates import normalized
from kdcli.errors import ConfigError

SMALLEST, LARGEST = 0.05, 20.0  # of the gap's factor: arXiv:2608.19098, Table 8
LEAST = 1e-6  # of an observed share, which is divided by


class TokenShare(Adaptive):
    """Rows of domains differ in length, so a domain's share of the loss is not its share of the rows. This weighs

        w_i ~ rows_i x target_i / observed share of the targets_i x (KL_now_i / KL at the beginning_i)^gap_power

    so that with `gap_power: 0` each domain's share of the loss becomes `target`; null is equal shares. Multiplying by
    the gap makes what is further from the teacher count more; the authors measured that dividing by it does harm. With
    `actuator: resample` the same share is reached by drawing.

    Departs from the authors' code, verl/workers/actor/mt_opd.py: the observed share is a moving average over updates
    (`decay`) and acts on the next step, where theirs is of the batch at hand.
    """

    remembered: ClassVar[tuple[str, ...]] = ("observed", "began")

    def __init__(
        self,
        *,
        target: Mapping[str, float] | None = None,
        gap_power: float = 0.0,
        decay: float = 0.9,
        interval: int = 1,
        first_interval: FirstInterval = "natural",
        actuator: Actuator = "reweight",
        **settings: Unpack[QuotaSettings],
    ) -> None:
        super().__init__(interval=interval, first_interval=first_interval, actuator=actuator, **settings)
        if not 0 <= decay < 1:
            raise ConfigError(f"domain_scheduler.decay is {decay}; give a number from 0 to below 1")
        if target is not None and (min(target.values(), default=0) < 0 or sum(target.values()) <= 0):
            raise ConfigError("domain_scheduler.target: shares must be at least 0, and one of them above")
        self.target = None if target is None else dict(target)
        self.gap_power, self.decay = gap_power, decay
        self.rows: dict[str, float] = {}  # shares of the rows drawn, where the actuator is `reweight`
        self.observed: dict[str, float] = {}
        self.began: dict[str, float] = {}

    @property
    def signals(self) -> frozenset[str]:
        return frozenset({"tokens", "kl"} if self.gap_power else {"tokens"})

    def begin(self) -> None:
        if self.target is not None:
            covers(self.target, self.natural, self.names, "target")
        self.rows, self.observed, self.began = dict(self.weights), {}, {}

    def first(self, weights: Mapping[str, float], losses: Mapping[str, DomainLoss]) -> dict[str, float]:
        self.began = self.read(losses, "kl") if self.gap_power else {}
        return super().first(weights, losses)

    def next(self, losses: Mapping[str, DomainLoss]) -> dict[str, float]:
        self.observed = ema(self.observed, self.shares(losses), self.decay)
        drawn = self.rows if self.actuator == "reweight" else self.weights
        wanted = dict.fromkeys(self.natural, 1.0) if self.target is None else self.target
        factor = self._gap(losses)
        return normalized(
            {name: drawn[name] * wanted[name] * factor[name] / max(self.observed[name], LEAST) for name in self.natural}
        )

    def _gap(self, losses: Mapping[str, DomainLoss]) -> dict[str, float]:
        if not self.gap_power:
            return dict.fromkeys(self.natural, 1.0)
        kl = self.read(losses, "kl")
        self.began = self.began or kl
        ratio = clamp(ratio_to_start(kl, self.began, 1e-12), 1e-12, 1e12)
        return clamp({name: math.pow(value, self.gap_power) for name, value in ratio.items()}, SMALLEST, LARGEST)
