"""What keeps a domain from being forgotten: functions of weights that sum to 1, and still do afterwards."""

from __future__ import annotations

import math
from collections.abc import Mapping

from kdcli.errors import ConfigError

Values = Mapping[str, float]


def mix(weights: Values, share: float) -> dict[str, float]:
    """(1 - share) p + share / K: at least share / K, and the order of the weights stays. DDK's share is 1 - alpha,
    DoReMi's and Sheared-LLaMA's c, D3-MOPD's K epsilon."""
    return {name: (1 - share) * p + share / len(weights) for name, p in weights.items()}


def min_probability(weights: Values, least: float) -> dict[str, float]:
    """Weights below `least` are raised to it, at the cost of the others in proportion to theirs. ADO.

    Departs from ADO's clip_min_probability, which divides by the sum afterwards and so ends below `least`.
    """
    raised: set[str] = set()
    while True:
        free = math.fsum(p for name, p in weights.items() if name not in raised)
        room = 1 - least * len(raised)
        scaled = {name: least if name in raised else p * room / free for name, p in weights.items()}
        low = {name for name, p in scaled.items() if p < least and name not in raised}
        if not low or len(raised) + len(low) == len(weights):
            return scaled if not low else {name: 1 / len(weights) for name in weights}
        raised |= low


def within(weights: Values, low: Values, high: Values) -> dict[str, float]:
    """Weights times one number, each held between `low` and `high`, with the number such that they sum to 1. There is
    one where the sum of `low` is at most 1 and that of `high` at least."""
    near, far = -800.0, 800.0  # of the logarithm of the number
    for _ in range(80):
        middle = (near + far) / 2
        if math.fsum(_held(weights, low, high, middle).values()) < 1:
            near = middle
        else:
            far = middle
    held = _held(weights, low, high, far)
    total = math.fsum(held.values())
    return {name: value / total for name, value in held.items()}


def _held(weights: Values, low: Values, high: Values, factor: float) -> dict[str, float]:
    times = math.exp(min(factor, 600.0))
    return {name: min(max(p * times, low[name]), high[name]) for name, p in weights.items()}


def fitting(least: float, domains: int, setting: str) -> None:
    """Raises ConfigError where `least` for each of the domains is more than there is to give."""
    if least * domains > 1:
        raise ConfigError(
            f"domain_scheduler.{setting} is {least:g}, and {domains} domains cannot have that much each; "
            f"give at most {1 / domains:.3g}"
        )
