"""Domains weigh what they hold: a row of any domain is drawn equally often."""

from __future__ import annotations

from collections.abc import Mapping

from kdcli.api import DomainLoss, DomainScheduler
from kdcli.domain_scheduler._adaptive import Quota


class Natural(DomainScheduler):
    """Weights in proportion to the number of training rows, for the whole run."""

    def __init__(self, *, quota: Quota = "iid") -> None:
        self.quota = quota

    def update(self, weights: Mapping[str, float], losses: Mapping[str, DomainLoss]) -> dict[str, float]:
        return dict(weights)
