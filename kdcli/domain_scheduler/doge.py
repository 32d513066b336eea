"""DoGE, domain reweighting with generalization estimation: Fan et al. 2023, arXiv:2310.15393."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Unpack

from kdcli.api import DomainLoss
from kdcli.domain_scheduler._adaptive import Actuator, Adaptive, FirstInterval, QuotaSettings
from kdcli.domain_scheduler._floors import mix
from kdcli.domain_scheduler._signals import clamp
from kdcli.domain_scheduler._updates import multiplicative
from kdcli.errors import ConfigError


class DoGE(Adaptive):
    """Domains whose gradient also helps the others weigh more, in the loss:

        s_i = min(max(<g_i, sum_{j != i} g_j> / mean_j |g_j|, 0), largest)
        p   = softmax(log p + lr s / mu)

    The alignment is the probe's (`DomainLoss.alignment`). The average of p over all updates (`averages`) is the
    method's answer, to train a larger model with.

    Departs from the authors' code, src/trainer.py: gradients are of held-out rows every `interval` steps and not of
    the batch every step, because each needs a backward pass per domain; and `lr` is the run's peak and does not
    follow its schedule.
    """

    signals = frozenset({"alignment"})

    def __init__(
        self,
        *,
        lr: float,
        mu: float = 0.01,
        largest: float = 5.0,
        floor: float = 0.0,
        interval: int = 100,
        first_interval: FirstInterval = "uniform",
        actuator: Actuator = "reweight",
        **settings: Unpack[QuotaSettings],
    ) -> None:
        super().__init__(interval=interval, first_interval=first_interval, actuator=actuator, **settings)
        if mu <= 0 or lr < 0:
            raise ConfigError(f"domain_scheduler: DoGE's mu is {mu} and its lr {lr}; give numbers above 0")
        if not 0 <= floor <= 1:
            raise ConfigError(f"domain_scheduler.floor is {floor}; give a share between 0 and 1")
        self.step_size = lr / mu
        self.largest = largest  # dw_max = 5.0, and dw_min = 0: src/trainer.py
        self.floor = floor  # reweight_eps = 0.0, the same

    def next(self, losses: Mapping[str, DomainLoss]) -> dict[str, float]:
        score = clamp(self.read(losses, "alignment"), 0.0, self.largest)
        return mix(multiplicative(self.weights, score, self.step_size), self.floor)
