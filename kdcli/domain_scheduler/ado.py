"""Adaptive Data Optimization: Jiang et al. 2024, arXiv:2410.11820."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, Unpack

from kdcli.api import DomainLoss
from kdcli.domain_scheduler._adaptive import Adaptive, FirstInterval, Settings
from kdcli.domain_scheduler._floors import fitting, min_probability
from kdcli.domain_scheduler._power_law import Point, PowerLaw, fit, thinned
from kdcli.domain_scheduler._signals import ema
from kdcli.domain_scheduler._updates import average, normalized
from kdcli.errors import ConfigError

SLOWEST = 0.05  # "arbitrarily bound exponent to be >= 0.05", src/data_selectors/ado.py
RECENT = 0.9  # of what was drawn: gamma, the same file


class ADO(Adaptive):
    """Domains whose loss still falls fast are drawn more often. Every domain's training loss gets a power law
    l(n) = floor + scale n^-b, fitted to the updates after the first `ignore`, every `refit` updates from `warmup` on:

        proposal ~ b (l(n) - floor) / n x share of rows x h^credit, and at least `least`
        p        = inertia (running average of the proposals) + (1 - inertia) proposal

    n counts updates for all domains alike, as the authors' code does (its `use_same_step_size`), and h is a moving
    average of the domains' shares of the targets.

    Departs from that code: the credit is h^credit as in the paper, and not (h (1 - h))^credit, which is 0 for a domain
    alone; the law is fitted by least squares, without its priors and filter; `least` is not undercut afterwards.
    """

    signals = frozenset({"trained", "tokens"})
    remembered: ClassVar[tuple[str, ...]] = ("curves", "laws", "drawn", "mean")

    def __init__(
        self,
        *,
        credit: float = 0.5,
        least: float = 0.01,
        inertia: float = 0.9,
        ignore: int = 500,
        warmup: int = 1000,
        refit: int = 1000,
        interval: int = 1,
        first_interval: FirstInterval = "natural",
        **settings: Unpack[Settings],
    ) -> None:
        super().__init__(interval=interval, first_interval=first_interval, **settings)
        if refit < 1 or not 0 <= ignore <= warmup - 4:
            raise ConfigError(
                f"domain_scheduler: refit={refit}, ignore={ignore}, warmup={warmup}; refit must be above 0, and "
                "at least 4 updates must lie between ignore and warmup, for a law to be fitted to"
            )
        if not 0 <= inertia <= 1:
            raise ConfigError(f"domain_scheduler.inertia is {inertia}; give a share between 0 and 1")
        self.credit, self.least, self.inertia = credit, least, inertia
        self.ignore, self.warmup, self.refit = ignore, warmup, refit
        self.curves: dict[str, list[Point]] = {}
        self.laws: dict[str, list[float]] = {}  # floor, scale, exponent
        self.drawn: dict[str, float] = {}  # h
        self.mean: dict[str, float] = {}  # running average of the proposals

    def begin(self) -> None:
        fitting(self.least, len(self.natural), "least")
        self.curves, self.laws = {}, {}
        self.drawn, self.mean = dict(self.natural), dict(self.natural)

    def next(self, losses: Mapping[str, DomainLoss]) -> dict[str, float] | None:
        n = float(self.updates)
        self.drawn = ema(self.drawn, self.shares(losses), RECENT)
        known = self.read(losses, "trained")
        if n > self.ignore:
            for name, loss in known.items():
                self.curves[name] = thinned([*self.curves.get(name, []), [n, loss, 1]])
        if n >= self.warmup and (n - self.warmup) % self.refit == 0:
            for name, points in self.curves.items():
                law = fit(points)
                self.laws[name] = [law.floor, law.scale, max(law.exponent, SLOWEST)]
        if not self.laws:
            return None
        proposal = min_probability(normalized({name: self._gain(name, n) for name in self.natural}), self.least)
        weights = {name: self.inertia * self.mean[name] + (1 - self.inertia) * p for name, p in proposal.items()}
        self.mean = average(self.mean, proposal, self.updates + 1)
        return weights

    def _gain(self, name: str, n: float) -> float:
        return PowerLaw(*self.laws[name]).speed(n) * self.natural[name] * math.pow(self.drawn[name], self.credit)
