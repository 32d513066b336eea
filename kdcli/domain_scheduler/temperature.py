"""Temperature sampling: between natural and uniform; common practice since multilingual BERT."""

from __future__ import annotations

import math
from collections.abc import Mapping

from kdcli.api import DomainLoss, DomainScheduler
from kdcli.domain_scheduler._adaptive import Quota
from kdcli.domain_scheduler._updates import softmax
from kdcli.errors import ConfigError


class Temperature(DomainScheduler):
    """p ~ n^(1 / temperature), n the number of training rows: 1 is natural, and larger is closer to uniform.

    Raises ConfigError for a temperature that is not above 0.
    """

    def __init__(self, *, temperature: float = 2.0, quota: Quota = "iid") -> None:
        if not temperature > 0 or not math.isfinite(temperature):
            raise ConfigError(f"domain_scheduler.temperature is {temperature}; give a number above 0")
        self.temperature = temperature  # tau
        self.quota = quota

    def initial(self, sizes: Mapping[str, int]) -> dict[str, float]:
        known = softmax({name: math.log(size) for name, size in sizes.items() if size > 0}, self.temperature)
        return {name: known.get(name, 0.0) for name in sizes}

    def update(self, weights: Mapping[str, float], losses: Mapping[str, DomainLoss]) -> dict[str, float]:
        return dict(weights)
