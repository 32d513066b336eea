"""A scheduler put together from parts: signal, smoother, update and floor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, Unpack

from kdcli.api import DomainLoss
from kdcli.domain_scheduler._adaptive import Adaptive, Settings
from kdcli.domain_scheduler._floors import fitting
from kdcli.domain_scheduler._named import FLOORS, SIGNALS, UPDATES, Moment, Situation
from kdcli.domain_scheduler._signals import ema
from kdcli.errors import ConfigError

REMEMBERED = 64  # probes that a signal can look back on, the first one among them


class Composed(Adaptive):
    """signal -> moving average -> update -> floor, each by name:

        signal  perplexity_ratio, loss_gap, excess_loss (clipped at 0), way_left (Velocitune's, towards the teacher),
                loss, learning_speed (slope of a fitted power law), kl, gap_velocity, alignment, trained
        decay   s <- decay s + (1 - decay) signal; 0 is none
        update  multiplicative: p exp(step_size s); softmax: exp(s / temperature), without memory; exp3: a bandit with
                reward s; chi2_dro: worst mixture within `radius` of the natural one; average: of softmax's weights
        floor   none; mix: (1 - least) p + least / K; min_probability: at least `least` each

    Signal perplexity_ratio, update multiplicative and floor mix with least 0.5 are DDK at its defaults. With
    `first_interval: r0` the first update is made right away, from the probe before the first step.
    """

    remembered: ClassVar[tuple[str, ...]] = ("past", "smooth", "rewards", "last")

    def __init__(
        self,
        *,
        signal: Literal[
            "perplexity_ratio",
            "loss_gap",
            "excess_loss",
            "way_left",
            "loss",
            "learning_speed",
            "kl",
            "gap_velocity",
            "alignment",
            "trained",
        ] = "perplexity_ratio",
        decay: float = 0.0,
        update: Literal["multiplicative", "softmax", "exp3", "chi2_dro", "average"] = "multiplicative",
        step_size: float = 1.0,
        temperature: float = 1.0,
        radius: float = 0.05,
        floor: Literal["none", "mix", "min_probability"] = "mix",
        least: float = 0.5,
        interval: int = 100,
        first_interval: Literal["natural", "r0", "uniform"] = "natural",
        **settings: Unpack[Settings],
    ) -> None:
        super().__init__(interval=interval, first_interval=first_interval, **settings)
        for name, value, known in (("signal", signal, SIGNALS), ("update", update, UPDATES), ("floor", floor, FLOORS)):
            if value not in known:
                raise ConfigError(f"domain_scheduler.{name} is {value!r}; give one of {', '.join(known)}")
        if not 0 <= decay < 1 or temperature <= 0 or radius < 0 or not 0 <= least <= 1:
            raise ConfigError(
                f"domain_scheduler: decay={decay}, temperature={temperature}, radius={radius}, least={least}; decay "
                "must be from 0 to below 1, temperature above 0, radius at least 0, least between 0 and 1"
            )
        self.signal, self.rule, self.floor = SIGNALS[signal], UPDATES[update], floor
        self.decay, self.least = decay, least
        self.step_size, self.temperature, self.radius = step_size, temperature, radius
        self.past: list[Moment] = []
        self.smooth: dict[str, float] = {}
        self.rewards: dict[str, float] = {}  # sums of signal / weight
        self.last: dict[str, float] = {}  # what the rule said last, before the floor

    @property
    def signals(self) -> frozenset[str]:
        return self.signal.fields

    def begin(self) -> None:
        if self.floor == "min_probability":
            fitting(self.least, len(self.natural), "least")
        self.past, self.smooth = [], {}
        self.rewards, self.last = dict.fromkeys(self.natural, 0.0), dict(self.natural)

    def first(self, weights: Mapping[str, float], losses: Mapping[str, DomainLoss]) -> dict[str, float]:
        weights = super().first(weights, losses)
        if self.first_interval != "r0":
            self._measure(losses)
            return weights
        self.weights = self._proposed(losses, 1) or self.weights
        return self.complete(self.weights)

    def next(self, losses: Mapping[str, DomainLoss]) -> dict[str, float] | None:
        return self._proposed(losses, self.updates + (self.first_interval == "r0"))

    def _proposed(self, losses: Mapping[str, DomainLoss], count: int) -> dict[str, float] | None:
        if not self._measure(losses):
            return None
        self.smooth = ema(self.smooth, self.signal.of(self.past), self.decay)
        for name, value in self.smooth.items():
            self.rewards[name] += value / max(self.weights[name], 1e-12)
        now = Situation(
            weights=self.weights,
            signal=self.smooth,
            natural=self.natural,
            sums=self.rewards,
            last=self.last,
            count=count,
            step_size=self.step_size,
            temperature=self.temperature,
            radius=self.radius,
        )
        self.last = self.rule(now)
        return FLOORS[self.floor](self.last, self.least)

    def _measure(self, losses: Mapping[str, DomainLoss]) -> bool:
        """Remember what was measured; False as long as no domain was."""
        moment = {field: self.read(losses, field) for field in sorted(self.signals)}
        if not all(moment.values()):
            return False
        self.past = [*self.past[:1], *[*self.past[1:], moment][-REMEMBERED + 1 :]]
        return True
