"""Schedulers that compare each domain's loss with one it should reach."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Unpack

from kdcli.api import DomainLoss
from kdcli.domain_scheduler._adaptive import Adaptive, FirstInterval, Settings
from kdcli.domain_scheduler._power_law import Point, fit, thinned
from kdcli.errors import ConfigError

Reference = Mapping[str, float] | Literal["teacher", "fitted"]

ENOUGH = 10  # a law is fitted to more points than that: DRPruning, DRO_loading_callback.py
EARLIEST = 0.1  # and not before this share of the run: the same


class Referenced(Adaptive):
    """`reference` is a loss per domain in nats per target; or `teacher`, the teacher's held-out loss; or `fitted`, what
    a power law of the student's own held-out losses so far predicts for step `horizon`, never above the lowest loss
    seen and never rising. Until that law has enough points (eleven, and a tenth of the run) weights stay.

    Raises ConfigError for a mapping that leaves out a domain, names one that does not exist, or is not finite.
    """

    remembered: ClassVar[tuple[str, ...]] = ("curves", "fitted")

    def __init__(
        self,
        *,
        reference: Reference,
        horizon: int,
        interval: int,
        first_interval: FirstInterval | Literal["r0"],
        **settings: Unpack[Settings],
    ) -> None:
        super().__init__(interval=interval, first_interval=first_interval, **settings)
        if horizon < 1:
            raise ConfigError(f"domain_scheduler.horizon is {horizon}; give the run's optimizer steps, ${{run.steps}}")
        self.reference = dict(reference) if isinstance(reference, Mapping) else reference
        self.horizon = horizon
        self.curves: dict[str, list[Point]] = {}  # held-out losses over steps
        self.fitted: dict[str, float] = {}  # what their laws predict

    @property
    def signals(self) -> frozenset[str]:
        return frozenset({"student", "teacher"} if self.reference == "teacher" else {"student"})

    def begin(self) -> None:
        self.curves, self.fitted = {}, {}
        if isinstance(self.reference, dict):
            covers(self.reference, self.natural, self.names, "reference")

    def references(self, student: Mapping[str, float], losses: Mapping[str, DomainLoss]) -> dict[str, float] | None:
        """The loss each domain should reach; None as long as nobody can say. Called once per update."""
        if isinstance(self.reference, dict):
            return {name: self.reference[name] for name in student}
        if self.reference == "teacher":
            return self.read(losses, "teacher")
        return self._predicted(student)

    def _predicted(self, student: Mapping[str, float]) -> dict[str, float] | None:
        step = float(self.updates * max(1, self.interval))
        for name, loss in student.items():
            self.curves[name] = thinned([*self.curves.get(name, []), [step, loss, 1]])
        if self.updates <= ENOUGH or step < EARLIEST * self.horizon:
            return None
        for name, points in self.curves.items():
            predicted = fit(points)(max(step, self.horizon))
            lowest = min(loss for _, loss, _ in points)
            self.fitted[name] = min(predicted, lowest, self.fitted.get(name, math.inf))
        return dict(self.fitted)


def covers(given: Mapping[str, Any], needed: Mapping[str, Any], names: tuple[str, ...], setting: str) -> None:
    """Raises ConfigError unless a setting has a finite number for each domain with rows, and for no other."""
    for name, value in given.items():
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]}?" if near else f"domains are {', '.join(names)}"
            raise ConfigError(f"domain_scheduler.{setting}.{name}: the data have no such domain; {hint}")
        if not math.isfinite(value):
            raise ConfigError(f"domain_scheduler.{setting}.{name} is {value}; give a finite number")
    missing = [name for name in needed if name not in given]
    if missing:
        raise ConfigError(f"domain_scheduler.{setting} has no number for {', '.join(missing)}; give one per domain")
