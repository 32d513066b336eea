"""What all schedulers that follow a signal have in common: settings, domains, the last measurements, state."""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, TypedDict

from kdcli.api import DomainLoss, DomainScheduler
from kdcli.domain_scheduler._updates import normalized, uniform
from kdcli.errors import ConfigError

Actuator = Literal["resample", "reweight"]
Quota = Literal["iid", "hamilton"]
FirstInterval = Literal["natural", "uniform"]

OF_TRAINING = frozenset({"trained", "tokens"})  # what the loop counts; the rest is measured by a probe
PER_BYTE = {"student": "student_per_byte", "teacher": "teacher_per_byte"}


class QuotaSettings(TypedDict, total=False):
    """Settings of every scheduler."""

    quota: Quota


class Settings(QuotaSettings, total=False):
    """Settings of every scheduler that follows a signal."""

    actuator: Actuator


class Adaptive(DomainScheduler):
    """Weights that follow what is measured: `next` is the method, the rest is here.

    The weights that the method goes by are its own state, so the first interval may be drawn by others
    (`first_interval`). Domains without training rows have weight 0 and count in no formula.

    A domain whose number is not finite keeps its last one. Raises ConfigError, naming the domain, where there is no
    last one, where it has no held-out rows, and where nobody knows the teacher's number.
    """

    cross_entropy: bool = False  # whether the training loss it reads must be the student's cross entropy
    remembered: ClassVar[tuple[str, ...]] = ()  # attributes of a method that are part of its state

    def __init__(
        self,
        *,
        interval: int,
        first_interval: FirstInterval | Literal["r0"] = "natural",
        actuator: Actuator = "resample",
        quota: Quota = "iid",
    ) -> None:
        if interval < 0:
            raise ConfigError(f"domain_scheduler.interval is {interval}; give the optimizer steps between updates")
        self.interval = interval
        self.first_interval = first_interval
        self.actuator = actuator
        self.quota = quota
        self.names: tuple[str, ...] = ()  # of all domains, also of those without rows
        self.natural: dict[str, float] = {}  # shares of rows, of the domains that have any
        self.weights: dict[str, float] = {}  # p: what the method goes by
        self.updates = 0
        self.sums: dict[str, float] = {}  # of the weights after each update
        self.measured: dict[str, dict[str, float]] = {}  # field -> domain -> its last finite value

    @abstractmethod
    def next(self, losses: Mapping[str, DomainLoss]) -> dict[str, float] | None:
        """The method: new weights of the domains that have rows; None keeps the old ones."""

    def begin(self) -> None:
        """Called once the domains are known (`natural`); refuses settings that do not fit them."""

    def initial(self, sizes: Mapping[str, int]) -> dict[str, float]:
        self.names = tuple(sizes)
        self.natural = normalized({name: float(size) for name, size in sizes.items() if size > 0})
        self.weights = uniform(self.natural) if self.first_interval == "uniform" else dict(self.natural)
        self.sums = dict.fromkeys(self.weights, 0.0)
        self.begin()
        return self.complete(self.weights)

    def first(self, weights: Mapping[str, float], losses: Mapping[str, DomainLoss]) -> dict[str, float]:
        for field in sorted(self.signals - OF_TRAINING):
            self.read(losses, field)
        return dict(weights)

    def update(self, weights: Mapping[str, float], losses: Mapping[str, DomainLoss]) -> dict[str, float]:
        del weights  # the loader's are these, or those of the first interval
        self.updates += 1
        self.weights = self.next(losses) or self.weights
        self.sums = {name: self.sums[name] + p for name, p in self.weights.items()}
        return self.complete(self.weights)

    def averages(self) -> dict[str, float]:
        """The mean of the weights after each update so far: what DoReMi and DoGE train the large model with."""
        return self.complete(normalized(self.sums) if self.updates else self.weights)

    def complete(self, weights: Mapping[str, float]) -> dict[str, float]:
        """With the domains that have no rows."""
        return {name: weights.get(name, 0.0) for name in self.names}

    def read(self, losses: Mapping[str, DomainLoss], field: str) -> dict[str, float]:
        """`field` of each domain that has rows, its last finite value where it has none now.

        Losses of both models are per byte where the probe gives them so, which is where their tokenizers differ. Of
        training (`trained`) a domain that was never drawn counts as the largest of the others, as DoReMi's code begins
        with the largest possible score; empty as long as none was drawn.
        """
        last = self.measured.setdefault(field, {})
        source = field
        if signals_both(self.signals) and any(loss.teacher_per_byte is not None for loss in losses.values()):
            source = PER_BYTE.get(field, field)
        for name in self.natural:
            value = getattr(losses[name], source) if name in losses else None
            if value is not None and math.isfinite(value):
                last[name] = float(value)
            elif field not in OF_TRAINING:
                self._explain(losses, name, field, value)
        if field in OF_TRAINING and last:
            return {name: last.get(name, max(last.values())) for name in self.natural}
        return {name: last[name] for name in self.natural if name in last}

    def shares(self, losses: Mapping[str, DomainLoss]) -> dict[str, float]:
        """Each domain's share of the targets since the last update; 0 where it was not drawn."""
        found = {name: getattr(losses.get(name), "tokens", None) or 0.0 for name in self.natural}
        found = {name: share if math.isfinite(share) else 0.0 for name, share in found.items()}
        return normalized(found) if any(found.values()) else dict(self.weights)

    def state_dict(self) -> dict[str, Any]:
        names = ("updates", "weights", "sums", "measured", *self.remembered)
        return copy.deepcopy({name: getattr(self, name) for name in names})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, value in copy.deepcopy(dict(state)).items():
            setattr(self, name, value)

    def _explain(self, losses: Mapping[str, DomainLoss], name: str, field: str, value: float | None) -> None:
        """Raises ConfigError where a domain's number can be had neither now nor from before."""
        method = type(self).__name__
        if name not in losses:
            raise ConfigError(f"{method}: domain {name} has no held-out rows; add some or lower probe.rows")
        if value is None and field in ("teacher", "kl"):
            raise ConfigError(
                f"{method}: nobody knows the teacher's {'loss' if field == 'teacher' else 'KL'} on domain {name}; set "
                "teacher=hf" + (", with the student's tokenizer" if field == "kl" or "trained" in self.signals else "")
            )
        if value is None:
            raise ConfigError(f"{method}: the probe gave no {field} of domain {name}, which its update needs")
        if name not in self.measured[field]:
            raise ConfigError(
                f"{method}: the {field} of domain {name} is {value} at its first probe; look at its held-out rows, "
                "or leave the domain out of the data"
            )


def signals_both(signals: frozenset[str]) -> bool:
    """Whether the student's and the teacher's losses on held-out rows are compared."""
    return {"student", "teacher"} <= signals
