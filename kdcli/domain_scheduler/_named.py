"""The parts of a scheduler by name, as `composed` combines them. A new part is a function and a line here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from kdcli.domain_scheduler import _floors, _signals, _updates
from kdcli.domain_scheduler._power_law import fit

Values = Mapping[str, float]
Moment = Mapping[str, Values]  # field of DomainLoss -> domain -> value
LEAST = 1e-9  # what is divided by


@dataclass(frozen=True)
class Signal:
    """One number per domain from what was measured, oldest first; the last entry is now."""

    fields: frozenset[str]
    of: Callable[[Sequence[Moment]], dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class Situation:
    """What an update rule goes by."""

    weights: Values
    signal: Values
    natural: Values
    sums: Values  # of the signals, each divided by the domain's weight at the time
    last: Values  # what the rule said last, before the floor
    count: int  # updates so far, this one included
    step_size: float
    temperature: float
    radius: float


def _gap_velocity(past: Sequence[Moment]) -> dict[str, float]:
    kls = [moment["kl"] for moment in past]
    left = _signals.ratio_to_start(kls[-1], kls[0], LEAST)
    return _signals.over_largest(_signals.product(left, _signals.descent(kls[-2:], LEAST)))


def _way_left(past: Sequence[Moment]) -> dict[str, float]:
    return _signals.remaining(past[-1]["student"], past[0]["student"], past[-1]["teacher"])


def _learning_speed(past: Sequence[Moment]) -> dict[str, float]:
    """The slope of a power law through the student's losses, over the largest; 0 until there are four."""
    losses = [moment["student"] for moment in past]
    speeds = {}
    for name in losses[-1]:
        points = [[float(n), loss[name], 1.0] for n, loss in enumerate(losses, start=1)]
        speeds[name] = fit(points).speed(len(points)) if len(points) > 3 else 0.0
    return _signals.over_largest(speeds)


SIGNALS: dict[str, Signal] = {
    "perplexity_ratio": Signal(
        frozenset({"student", "teacher"}),
        lambda past: _signals.perplexity_ratio(past[-1]["student"], past[-1]["teacher"]),
    ),
    "loss_gap": Signal(
        frozenset({"student", "teacher"}), lambda past: _signals.loss_gap(past[-1]["student"], past[-1]["teacher"])
    ),
    "excess_loss": Signal(
        frozenset({"student", "teacher"}),
        lambda past: _signals.loss_gap(past[-1]["student"], past[-1]["teacher"], clip=True),
    ),
    "way_left": Signal(frozenset({"student", "teacher"}), _way_left),
    "loss": Signal(frozenset({"student"}), lambda past: dict(past[-1]["student"])),
    "learning_speed": Signal(frozenset({"student"}), _learning_speed),
    "kl": Signal(frozenset({"kl"}), lambda past: dict(past[-1]["kl"])),
    "gap_velocity": Signal(frozenset({"kl"}), _gap_velocity),
    "alignment": Signal(frozenset({"alignment"}), lambda past: dict(past[-1]["alignment"])),
    "trained": Signal(frozenset({"trained"}), lambda past: dict(past[-1]["trained"])),
}

UPDATES: dict[str, Callable[[Situation], dict[str, float]]] = {
    "multiplicative": lambda now: _updates.multiplicative(now.weights, now.signal, now.step_size),
    "softmax": lambda now: _updates.softmax(now.signal, now.temperature),
    "exp3": lambda now: _updates.exp3(now.sums, now.count),
    "chi2_dro": lambda now: _updates.chi2_dro(now.natural, now.signal, now.radius),
    "average": lambda now: _updates.average(now.last, _updates.softmax(now.signal, now.temperature), now.count),
}

FLOORS: dict[str, Callable[[Values, float], dict[str, float]]] = {
    "none": lambda weights, least: dict(weights),
    "mix": _floors.mix,
    "min_probability": _floors.min_probability,
}
