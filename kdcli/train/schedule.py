"""Numbers of objectives that change during a run: a mapping `{schedule: KIND, …}` where a config has a number.

A kind is one class; its keyword settings are those of the mapping, and `KINDS` names it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from kdcli.api import Stateful
from kdcli.errors import ConfigError

KEY = "schedule"  # of a mapping: the name of the kind


@dataclass(frozen=True)
class Progress:
    """How far a run is."""

    step: int  # optimizer steps done
    steps: int  # of the whole run
    epoch: int = 0  # passes over the training rows that are complete

    @property
    def share(self) -> float:
        """Of the run, from 0 to 1."""
        return min(1.0, self.step / self.steps)


BEGIN = Progress(step=0, steps=1)


class Schedule(Stateful, ABC):
    """A number that depends on how far the run is, or on the loss of the term it belongs to."""

    spread: ClassVar[bool] = False  # over the whole run: another run.steps changes its values

    @abstractmethod
    def value(self, progress: Progress) -> float:
        """The number for the optimizer step after `progress.step`."""

    @property
    @abstractmethod
    def extremes(self) -> tuple[float, ...]:
        """Numbers between which every value lies: what an objective must accept before a run begins."""

    def after_step(self, loss: float, progress: Progress) -> None:
        """Learn from a finished optimizer step: the term's mean `loss` in it, and how far the run is now."""


class Constant(Schedule):
    """`value`, always."""

    def __init__(self, *, value: float) -> None:
        self.constant = _finite("value", value)

    def value(self, progress: Progress) -> float:
        return self.constant

    @property
    def extremes(self) -> tuple[float, ...]:
        return (self.constant,)


class Linear(Schedule):
    """A straight line from `start` to `end` while the share of run.steps that is done goes from `begin` to `until`;
    flat before and after:

        x     = (step / steps - begin) / (until - begin), kept within 0 and 1
        value = (1 - x) start + x end

    As with learning rates, the first step sees x = 0, and x = 1 is reached after `until` of the steps.
    """

    spread = True

    def __init__(self, *, start: float, end: float, begin: float = 0.0, until: float = 1.0) -> None:
        self.start, self.end = _finite("start", start), _finite("end", end)
        self.begin, self.until = _finite("begin", begin), _finite("until", until)
        if not 0 <= self.begin < self.until <= 1:
            raise ConfigError(
                f"begin is {begin} and until is {until}, but they are shares of run.steps: 0 <= begin < until <= 1"
            )

    def value(self, progress: Progress) -> float:
        x = min(1.0, max(0.0, (progress.share - self.begin) / (self.until - self.begin)))
        weight, way = self.weight(x), self.end - self.start
        return self.start + weight * way if weight < 0.5 else self.end - (1 - weight) * way  # exact at both ends

    def weight(self, x: float) -> float:
        """How much of the way from `start` to `end` lies behind, after the share `x` of the time."""
        return x

    @property
    def extremes(self) -> tuple[float, ...]:
        return (self.start, self.end)


class Cosine(Linear):
    """Half a cosine from `start` to `end`, flat at both (Loshchilov & Hutter 2017, arXiv:1608.03983, eq. 5, without
    restarts), with x as in `linear`:

        value = end + (start - end) (1 + cos(pi x)) / 2
    """

    def weight(self, x: float) -> float:
        return (1 - math.cos(math.pi * x)) / 2


class Epochs(Schedule):
    """`values[e]` during epoch e = 0, 1, …, and the last one afterwards. An epoch is one pass over as many rows as the
    training data have, in whatever proportions domains are drawn."""

    def __init__(self, *, values: Sequence[float]) -> None:
        if not values:
            raise ConfigError("values is empty; give a number for each epoch, such as [2, 1.5, 1]")
        self.values = tuple(_finite("values", value) for value in values)

    def value(self, progress: Progress) -> float:
        return self.values[min(progress.epoch, len(self.values) - 1)]

    @property
    def extremes(self) -> tuple[float, ...]:
        return self.values


class TAID(Schedule):
    """TAID's adaptive schedule: Shing et al. 2025, arXiv:2501.16937, algorithm 1. t rises from `start` to `end`, faster
    while the term's loss falls. After each optimizer step but the first, whose loss is only remembered:

        change = (previous loss - loss) / (previous loss + 1e-15)
        m      = momentum m + (1 - momentum) change                  (m = 0 at first)
        delta  = alpha sigmoid(m) (1 - t)
        t      = min(end, max(start + (end - start) step / steps, t + delta))

    with `step` of `steps` optimizer steps done, so t is never behind the straight line. `start`, `end` and `momentum`
    are the paper's t_start, t_end and beta. Departs from the official code, which updates once per micro-batch: once
    per optimizer step, so that t does not depend on how a step is cut. A step without a unit of the term has no loss
    and changes nothing.
    """

    spread = True

    def __init__(self, *, start: float = 0.4, end: float = 1.0, alpha: float = 5e-4, momentum: float = 0.99) -> None:
        self.start, self.end = _finite("start", start), _finite("end", end)
        self.alpha, self.beta = _finite("alpha", alpha), _finite("momentum", momentum)
        if not 0 <= self.start <= self.end <= 1:
            raise ConfigError(f"start is {start} and end is {end}, but must be 0 <= start <= end <= 1")
        if self.alpha < 0:
            raise ConfigError(f"alpha is {alpha}; set a number of at least 0 (0 leaves the straight line)")
        if not 0 <= self.beta < 1:
            raise ConfigError(f"momentum is {momentum}; set a number from 0 to below 1")
        self.t = self.start
        self.momentum = 0.0
        self.previous_loss: float | None = None

    def value(self, progress: Progress) -> float:
        return self.t

    @property
    def extremes(self) -> tuple[float, ...]:
        return (self.start, self.end)

    def after_step(self, loss: float, progress: Progress) -> None:
        previous, self.previous_loss = self.previous_loss, loss
        if previous is None:
            return
        change = (previous - loss) / (previous + 1e-15)
        self.momentum = self.beta * self.momentum + (1 - self.beta) * change
        delta = self.alpha * _sigmoid(self.momentum) * (1 - self.t)
        line = self.start + (self.end - self.start) * progress.share
        self.t = min(self.end, max(line, self.t + delta))

    def state_dict(self) -> dict[str, Any]:
        return {"t": self.t, "momentum": self.momentum, "previous_loss": self.previous_loss}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.t, self.momentum, self.previous_loss = state["t"], state["momentum"], state["previous_loss"]


KINDS: dict[str, type[Schedule]] = {
    "constant": Constant,
    "linear": Linear,
    "cosine": Cosine,
    "epochs": Epochs,
    "taid": TAID,
}


def is_schedule(value: Any) -> bool:
    """Whether a config value stands for a number that changes."""
    return isinstance(value, Mapping) and KEY in value


def schedule_of(node: Mapping[str, Any]) -> Schedule:
    """The schedule that a mapping describes, at its beginning. Raises ConfigError for a kind or settings that do not
    exist, and for values that the kind refuses."""
    settings = {key: value for key, value in node.items() if key != KEY}
    kind = KINDS.get(str(node[KEY]))
    if kind is None:
        raise ConfigError(f"there is no schedule {node[KEY]}; there is {', '.join(KINDS)}")
    try:
        return kind(**settings)
    except (TypeError, ValueError) as error:  # not from a checked config
        raise ConfigError(f"the schedule {node[KEY]} cannot be made of {settings}: {error}") from None


def start_values(node: Mapping[str, Any]) -> dict[str, Any]:
    """A component's config with each schedule replaced by its value for the first step."""
    return {key: schedule_of(value).value(BEGIN) if is_schedule(value) else value for key, value in node.items()}


def _finite(name: str, value: float) -> float:
    if not math.isfinite(float(value)):
        raise ConfigError(f"{name} is {value}; set a finite number")
    return float(value)


def _sigmoid(x: float) -> float:
    """Without overflow, however fast a loss rises."""
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
