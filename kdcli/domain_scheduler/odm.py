"""Online Data Mixing: Albalak et al. 2023, arXiv:2312.02406."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, Unpack

from kdcli.api import DomainLoss
from kdcli.domain_scheduler._adaptive import Adaptive, FirstInterval, Settings
from kdcli.domain_scheduler._updates import exp3
from kdcli.errors import ConfigError


class ODM(Adaptive):
    """A bandit whose arms are domains and whose reward is the training loss: what is not learned yet is drawn more.

        R_i <- R_i + scale l_i / p_i, of the domains drawn since the last update
        p_i  = (1 - K epsilon_t) softmax(epsilon_{t-1} R)_i + epsilon_t,  epsilon_t = min(1/K, sqrt(ln K / (K t)))

    after `warmup` updates in which rewards are collected and weights stay. With `decay` the sum is a moving average,
    R <- decay R + (1 - decay) scale l / p, as in DataFlex (0.9 there); null is the sum of the authors' code,
    megatron/data/data_sampling_utils.py.
    """

    signals = frozenset({"trained"})
    remembered: ClassVar[tuple[str, ...]] = ("rewards",)

    def __init__(
        self,
        *,
        scale: float = 0.1,
        decay: float | None = None,
        warmup: int = 2000,
        interval: int = 1,
        first_interval: FirstInterval = "natural",
        **settings: Unpack[Settings],
    ) -> None:
        super().__init__(interval=interval, first_interval=first_interval, **settings)
        if decay is not None and not 0 <= decay < 1:
            raise ConfigError(f"domain_scheduler.decay is {decay}; give null, or a number from 0 to below 1")
        self.scale = scale  # reward/10, data_sampling_utils.py
        self.decay = decay
        self.warmup = warmup
        self.rewards: dict[str, float] = {}  # R

    def begin(self) -> None:
        self.rewards = dict.fromkeys(self.natural, 0.0)

    def next(self, losses: Mapping[str, DomainLoss]) -> dict[str, float] | None:
        known = self.read(losses, "trained")
        for name in (name for name in known if _finite(losses.get(name))):
            reward = self.scale * known[name] / self.weights[name]
            kept, part = (1.0, 1.0) if self.decay is None else (self.decay, 1 - self.decay)
            self.rewards[name] = kept * self.rewards[name] + part * reward
        return None if self.updates <= self.warmup else exp3(self.rewards, self.updates)


def _finite(loss: DomainLoss | None) -> bool:
    """Whether the domain was drawn since the last update, and its loss is a number."""
    return loss is not None and loss.trained is not None and math.isfinite(loss.trained)
