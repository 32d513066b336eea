"""Fixed domain weights, chosen by hand."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping

from kdcli.api import DomainLoss, DomainScheduler
from kdcli.domain_scheduler._adaptive import Quota
from kdcli.errors import ConfigError


class Static(DomainScheduler):
    """`weights` per domain, in any unit; they are divided by their sum. A domain that is left out is not drawn.

    Raises ConfigError for a weight that is negative or not finite, for weights that are all zero, and, once the
    domains are known, for one that does not exist.
    """

    def __init__(self, *, weights: Mapping[str, float], quota: Quota = "iid") -> None:
        for name, weight in weights.items():
            if not math.isfinite(weight) or weight < 0:
                raise ConfigError(f"domain_scheduler.weights.{name} is {weight}; give a finite number of at least 0")
        if sum(weights.values()) <= 0:
            raise ConfigError("domain_scheduler.weights are all 0; give at least one domain a weight")
        self.weights = dict(weights)
        self.quota = quota

    def initial(self, sizes: Mapping[str, int]) -> dict[str, float]:
        for name in self.weights:
            if name not in sizes:
                near = difflib.get_close_matches(name, list(sizes), n=1)
                hint = f"did you mean {near[0]}?" if near else f"domains are {', '.join(sizes)}"
                raise ConfigError(f"domain_scheduler.weights.{name}: the data have no such domain; {hint}")
        total = sum(self.weights.values())
        return {name: self.weights.get(name, 0.0) / total for name in sizes}

    def update(self, weights: Mapping[str, float], losses: Mapping[str, DomainLoss]) -> dict[str, float]:
        return dict(weights)
