"""DoReMi: Xie et al. 2023, arXiv:2305.10429, Algorithm 1."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Literal, Unpack

from kdcli.api import DomainLoss
from kdcli.domain_scheduler._adaptive import Actuator, Adaptive, FirstInterval, QuotaSettings
from kdcli.domain_scheduler._floors import mix
from kdcli.domain_scheduler._reference import covers
from kdcli.domain_scheduler._signals import loss_gap
from kdcli.domain_scheduler._updates import multiplicative
from kdcli.errors import ConfigError

log = logging.getLogger(__name__)


class DoReMi(Adaptive):
    """Domains with more excess loss weigh more, in the loss:

        lambda_i = max(l_i - l_ref_i, 0)
        p        = (1 - floor) softmax(log p + step_size lambda) + floor / K

    every step, from the training loss since the last update; a domain that was not drawn keeps its lambda. DoReMi's
    answer is the average of p over all updates (`averages`), which then is `static` in the run that counts.

    `reference` is a loss per domain, or null: the teacher's on held-out rows, in place of the paper's reference model.
    The training loss is that of the run's objectives, so it must be the cross entropy to be compared with another;
    a config where it is not is refused. `losses: heldout` takes the student's loss on held-out rows instead, which
    fits any objective; each update then costs a probe, so raise `interval`.

    Departs from Algorithm 1: the excess is clipped at 0 per domain and not per token.
    """

    def __init__(
        self,
        *,
        reference: Mapping[str, float] | None = None,
        losses: Literal["trained", "heldout"] = "trained",
        step_size: float = 1.0,
        floor: float = 1e-3,
        interval: int = 1,
        first_interval: FirstInterval = "uniform",
        actuator: Actuator = "reweight",
        **settings: Unpack[QuotaSettings],
    ) -> None:
        super().__init__(interval=interval, first_interval=first_interval, actuator=actuator, **settings)
        if not 0 <= floor <= 1:
            raise ConfigError(f"domain_scheduler.floor is {floor}; give a share between 0 and 1")
        self.reference = None if reference is None else dict(reference)
        self.field = "trained" if losses == "trained" else "student"
        self.cross_entropy = losses == "trained"
        self.step_size = step_size  # eta = 1, scripts/runs/run_pile_doremi120M.sh
        self.floor = floor  # c = 1e-3, the same

    @property
    def signals(self) -> frozenset[str]:
        return frozenset({self.field} if self.reference is not None else {self.field, "teacher"})

    def begin(self) -> None:
        if self.reference is not None:
            covers(self.reference, self.natural, self.names, "reference")

    def next(self, losses: Mapping[str, DomainLoss]) -> dict[str, float] | None:
        found = self.read(losses, self.field)
        if not found:
            return None
        reference = self.read(losses, "teacher") if self.reference is None else self.reference
        excess = loss_gap(found, reference, clip=True)
        if self.updates == 1 and not any(excess.values()):
            log.warning("DoReMi: no domain's %s loss is above its reference, so all weigh alike", self.field)
        return mix(multiplicative(self.weights, excess, self.step_size), self.floor)
