"""DRPruning: Deng et al. 2024, arXiv:2411.14055."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Unpack

from kdcli.api import DomainLoss
from kdcli.domain_scheduler._adaptive import FirstInterval, Settings
from kdcli.domain_scheduler._floors import within
from kdcli.domain_scheduler._reference import Reference, Referenced
from kdcli.domain_scheduler._signals import clamp, ema, loss_gap
from kdcli.domain_scheduler._updates import chi2_dro, normalized
from kdcli.errors import ConfigError

SETTLED = 0.2  # of the run is over before the reference ratio moves: DRO_loading_callback.py
WITHIN = 2.0  # of the initial ratio, up and down: `times`, the same


class DRPruning(Referenced):
    """The mixture that is worst for the student, within a chi-squared ball around a reference ratio:

        d_i = l_i - l_ref_i, on held-out rows
        q   ~ ratio relu(d - eta), q / ratio >= least, with 1/2 sum((q / ratio - 1)^2 ratio) = radius
        q  <- max(q, smallest ratio), normalized

    The ratio is that of the first interval, and from a fifth of the run on it follows q: ratio <- (1 - follow) ratio +
    follow q, within half and twice of what it was and between its smallest and largest share; `follow: 0` keeps it.

    Departs from the authors' code, drpruning/callbacks/DRO_loading_callback.py. It lowers all references together as
    long as every domain is below its own, which is not needed here, as adding a number to d changes nothing. The ratio
    keeps its bounds, which theirs leaves when it is normalized. The law of `fitted` references is fitted by least
    squares. d is not averaged over updates, as theirs is where it comes from training losses.
    """

    remembered: ClassVar[tuple[str, ...]] = (*Referenced.remembered, "ratio")

    def __init__(
        self,
        *,
        horizon: int,
        reference: Reference = "fitted",
        radius: float = 0.05,
        least: float = 0.2,
        follow: float = 0.1,
        interval: int = 400,
        first_interval: FirstInterval = "natural",
        **settings: Unpack[Settings],
    ) -> None:
        super().__init__(
            reference=reference, horizon=horizon, interval=interval, first_interval=first_interval, **settings
        )
        if radius < 0:
            raise ConfigError(f"domain_scheduler.radius is {radius}; give a number of at least 0, such as 0.05 or 0.1")
        for name, value in (("least", least), ("follow", follow)):
            if not 0 <= value <= 1:
                raise ConfigError(f"domain_scheduler.{name} is {value}; give a share between 0 and 1")
        self.radius = radius  # rho
        self.least = least  # min_prob
        self.follow = follow
        self.ratio: dict[str, float] = {}  # p_train
        self.began: dict[str, float] = {}

    def begin(self) -> None:
        super().begin()
        self.ratio, self.began = dict(self.weights), dict(self.weights)

    def next(self, losses: Mapping[str, DomainLoss]) -> dict[str, float] | None:
        student = self.read(losses, "student")
        reference = self.references(student, losses)
        if reference is None:
            return None
        q = chi2_dro(self.ratio, loss_gap(student, reference), self.radius, self.least)
        q = normalized(clamp(q, min(self.ratio.values()), 1.0))
        smallest, largest = min(self.began.values()), max(self.began.values())
        if self.follow and self.updates * max(1, self.interval) >= SETTLED * self.horizon:
            low = {name: max(p / WITHIN, smallest) for name, p in self.began.items()}
            high = {name: min(p * WITHIN, largest) for name, p in self.began.items()}
            self.ratio = within(ema(self.ratio, q, 1 - self.follow), low, high)
        return q
