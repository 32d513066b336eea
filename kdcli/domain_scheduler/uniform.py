"""Every domain is drawn equally often, whatever it holds."""

from __future__ import annotations

from collections.abc import Mapping

from kdcli.api import DomainLoss, DomainScheduler
from kdcli.domain_scheduler._adaptive import Quota
from kdcli.domain_scheduler._updates import normalized


class Uniform(DomainScheduler):
    """Equal weights for the whole run, which is temperature sampling at an infinite temperature. Small domains are gone
    through more often than large ones. DDK's ablation calls it equal sampling."""

    def __init__(self, *, quota: Quota = "iid") -> None:
        self.quota = quota

    def initial(self, sizes: Mapping[str, int]) -> dict[str, float]:
        return normalized({name: float(size > 0) for name, size in sizes.items()})

    def update(self, weights: Mapping[str, float], losses: Mapping[str, DomainLoss]) -> dict[str, float]:
        return dict(weights)
