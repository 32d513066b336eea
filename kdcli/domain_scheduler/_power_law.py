"""How a loss falls with training: l(n) = floor + scale n^-exponent, fitted to what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Point = list[float]  # n (above 0), loss, how many measurements it is the mean of

EXPONENTS = (0.02, 1.0)  # the range that is searched


@dataclass(frozen=True)
class PowerLaw:
    """l(n) in nats per target; n in any unit of training, such as optimizer steps."""

    floor: float
    scale: float
    exponent: float

    def __call__(self, n: float) -> float:
        return self.floor + self.scale * n**-self.exponent

    def speed(self, n: float) -> float:
        """-dl/dn = exponent (l(n) - floor) / n: what one more unit of training is worth. ADO."""
        return self.exponent * self.scale * n**-self.exponent / n


def fit(points: Sequence[Point]) -> PowerLaw:
    """Least squares, with floor and scale at least 0; a loss that does not fall has scale 0.

    For each exponent of a grid, refined once, floor and scale have a closed form, so there is nothing to initialize
    and the result is the same everywhere. Departs from ADO and DRPruning, which minimize a Huber loss by L-BFGS.
    """
    n, loss, weight = np.asarray(points, dtype=np.float64).T
    unit = n[-1]  # exponents act on n / unit, which keeps the sums well scaled
    low, high = EXPONENTS
    best = min((_at(n / unit, loss, weight, b) for b in np.linspace(low, high, 50)), key=lambda found: found[0])
    width = (high - low) / 49
    around = np.linspace(max(low, best[3] - width), min(high, best[3] + width), 50)
    _, floor, scale, exponent = min((_at(n / unit, loss, weight, b) for b in around), key=lambda found: found[0])
    return PowerLaw(floor, float(scale * unit**exponent), exponent)


def thinned(points: list[Point], most: int = 256) -> list[Point]:
    """At most `most` points: neighbours are averaged, two into one, once there are more."""
    if len(points) <= most:
        return points
    pairs = [points[i : i + 2] for i in range(0, len(points), 2)]
    return [_mean(pair) for pair in pairs]


def _mean(pair: list[Point]) -> Point:
    count = sum(point[2] for point in pair)
    return [sum(p[0] * p[2] for p in pair) / count, sum(p[1] * p[2] for p in pair) / count, count]


def _at(n: np.ndarray, loss: np.ndarray, weight: np.ndarray, exponent: float) -> tuple[float, float, float, float]:
    """(squared error, floor, scale, exponent) of the best floor and scale at one exponent."""
    x = n**-exponent
    total = weight.sum()
    mean_x, mean_loss = (weight * x).sum() / total, (weight * loss).sum() / total
    variance = (weight * (x - mean_x) ** 2).sum()
    scale = (weight * (x - mean_x) * (loss - mean_loss)).sum() / variance if variance > 0 else 0.0
    scale = max(0.0, scale)
    floor = mean_loss - scale * mean_x
    if floor < 0:
        floor, scale = 0.0, max(0.0, (weight * x * loss).sum() / (weight * x * x).sum())
    error = (weight * (loss - floor - scale * x) ** 2).sum()
    return float(error), float(floor), float(scale), float(exponent)
