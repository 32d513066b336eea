"""From weights and a signal to new weights: functions of dictionaries. Weights sum to 1.

All exponentials are taken after the largest exponent was subtracted, so no signal overflows; and all sums are exactly
rounded (`math.fsum`), so the order of domains changes nothing, not even the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

TINY = 5e-324  # what a weight of 0 counts as in a logarithm: the smallest number, so that a weight can come back

Values = Mapping[str, float]


def normalized(values: Values) -> dict[str, float]:
    """Divided by their sum; equal shares where that is 0."""
    largest = max(values.values(), default=0.0)
    if largest <= 0:
        return uniform(values)
    if largest > 1e290:  # the sum might overflow
        return normalized({name: value / largest for name, value in values.items()})
    total = math.fsum(values.values())
    return {name: value / total for name, value in values.items()}


def uniform(names: Mapping[str, object]) -> dict[str, float]:
    """Equal shares."""
    return {name: 1 / len(names) for name in names}


def softmax(values: Values, temperature: float = 1.0) -> dict[str, float]:
    """exp(value / temperature), normalized."""
    scaled = {name: value / temperature for name, value in values.items()}
    largest = max(scaled.values(), default=0.0)
    return normalized({name: math.exp(value - largest) for name, value in scaled.items()})


def multiplicative(weights: Values, signal: Values, step_size: float = 1.0) -> dict[str, float]:
    """p' ~ p exp(step_size x signal): exponentiated gradient, as in DoReMi, Sheared-LLaMA, DoGE and DDK."""
    return softmax({name: math.log(max(p, TINY)) + step_size * signal[name] for name, p in weights.items()})


def exploration(update: int, domains: int) -> float:
    """Exp3's epsilon_t = min(1/K, sqrt(ln K / (K t))); 1/K at t = 0. ODM."""
    if update == 0:
        return 1 / domains
    return min(1 / domains, math.sqrt(math.log(domains) / (domains * update)))


def exp3(rewards: Values, update: int) -> dict[str, float]:
    """(1 - K epsilon_t) softmax(epsilon_{t-1} R) + epsilon_t, of the estimated rewards R at update t = 1, 2 … ODM."""
    count = len(rewards)
    before, now = exploration(update - 1, count), exploration(update, count)
    chosen = softmax({name: before * reward for name, reward in rewards.items()})
    return {name: (1 - count * now) * p + now for name, p in chosen.items()}


def chi2_dro(reference: Values, signal: Values, radius: float, least: float = 0.0) -> dict[str, float]:
    """The worst mixture for the learner within a chi-squared ball around `reference`: q ~ p relu(signal - eta), with
    q / p at least `least` before it is normalized, and eta such that 1/2 sum((q / p - 1)^2 p) = radius. DRPruning.

    Where no eta goes that far, the mixture is the one at the largest eta. Adding a number to the signal, or multiplying
    it by a positive one, changes nothing.
    """
    low, high = min(signal.values()), max(signal.values())
    spread = high / 2 - low / 2  # halves, so that the difference does not overflow
    if spread <= 0:
        return dict(reference)
    distance = {name: (high / 2 - value / 2) / spread for name, value in signal.items()}  # 0 is the best, 1 the worst

    def mixture(reach: float) -> dict[str, float]:
        """relu(signal - eta), eta being `reach` spreads below the largest signal."""
        raw = {name: max(0.0, reach - distance[name]) for name in reference}
        q = normalized({name: p * raw[name] for name, p in reference.items()})
        held = {name: p * max(q[name] / p, least) if p > 0 else 0.0 for name, p in reference.items()}
        return normalized(held)

    def divergence(q: Values) -> float:
        return 0.5 * math.fsum((q[name] / p - 1) ** 2 * p for name, p in reference.items() if p > 0)

    near, far = math.log(1e-9), math.log(1e9)  # of the reach: from the largest signal alone to hardly any tilt
    if divergence(mixture(math.exp(near))) <= radius:
        return mixture(math.exp(near))
    for _ in range(80):
        middle = (near + far) / 2
        if divergence(mixture(math.exp(middle))) > radius:
            near = middle
        else:
            far = middle
    return mixture(math.exp(far))


def average(mean: Values, new: Values, count: int) -> dict[str, float]:
    """The mean of `count` weights, given that of the `count` - 1 before the new ones."""
    return {name: value + (new[name] - value) / count for name, value in mean.items()}
