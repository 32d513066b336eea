"""The formulas of the papers, written a second time: float64 numpy, one target after another, no code shared.

An oracle has the name of its objective's module. It takes one target's logits y (teacher) and z (student), both
[V] and divided by the temperature, the target id, and by name the settings of the objective that it reads.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.float64]  # [V]


def cross_entropy(y: Logits, z: Logits, target: int, label_smoothing: float) -> float:
    wanted = np.full(len(z), label_smoothing / len(z))
    wanted[target] += 1 - label_smoothing
    return -float(wanted @ _log_softmax(z))


def forward_kl(y: Logits, z: Logits, target: int) -> float:
    return _kl(_log_softmax(y), _log_softmax(z))


def hinton(y: Logits, z: Logits, target: int) -> float:
    return _kl(_log_softmax(y), _log_softmax(z))


def reverse_kl(y: Logits, z: Logits, target: int) -> float:
    return _kl(_log_softmax(z), _log_softmax(y))


def symmetric_kl(y: Logits, z: Logits, target: int, forward_weight: float) -> float:
    return forward_weight * forward_kl(y, z, target) + (1 - forward_weight) * reverse_kl(y, z, target)


def generalized_jsd(y: Logits, z: Logits, target: int, beta: float) -> float:
    u, v = _log_softmax(y), _log_softmax(z)
    m = _log_mix(u, v, beta)
    return beta * _kl(u, m) + (1 - beta) * _kl(v, m)


def total_variation(y: Logits, z: Logits, target: int) -> float:
    p, q = np.exp(_log_softmax(y)), np.exp(_log_softmax(z))
    return float(np.maximum(p - q, 0).sum())  # the mass to be moved: equal to half the sum of |p - q|


def skew_kl(y: Logits, z: Logits, target: int, alpha: float) -> float:
    u, v = _log_softmax(y), _log_softmax(z)
    return _kl(u, _log_mix(u, v, alpha))


def skew_reverse_kl(y: Logits, z: Logits, target: int, alpha: float) -> float:
    u, v = _log_softmax(y), _log_softmax(z)
    return _kl(v, _log_mix(v, u, alpha))


def adaptive_kl(y: Logits, z: Logits, target: int, mu: float) -> float:
    p, q = np.exp(_log_softmax(y)), np.exp(_log_softmax(z))
    mass, head, tail = 0.0, 0.0, 0.0
    for rank, v in enumerate(np.argsort(-p, kind="stable")):
        mass += p[v]
        if rank == 0 or mass <= mu:
            head += abs(p[v] - q[v])
        else:
            tail += abs(p[v] - q[v])
    w = float(head / (head + tail)) if head + tail > 0 else 0.5
    return w * forward_kl(y, z, target) + (1 - w) * reverse_kl(y, z, target)


def alpha_beta(y: Logits, z: Logits, target: int, alpha: float, beta: float) -> float:
    """Eq. 1 of Cichocki et al. 2011 and its four limits, each as printed."""
    u, v = _log_softmax(y), _log_softmax(z)
    a, b, s = alpha, beta, alpha + beta
    if a == 0 and b == 0:
        terms = np.square(u - v) / 2
    elif a == 0:
        terms = (np.exp(b * v) * b * (v - u) - np.exp(b * v) + np.exp(b * u)) / b**2
    elif b == 0:
        terms = (np.exp(a * u) * a * (u - v) - np.exp(a * u) + np.exp(a * v)) / a**2
    elif s == 0:
        terms = (a * (v - u) + np.exp(a * (u - v)) - 1) / a**2
    else:
        terms = -(np.exp(a * u + b * v) - a / s * np.exp(s * u) - b / s * np.exp(s * v)) / (a * b)
    return float(np.asarray(terms).sum())


def logit_mse(y: Logits, z: Logits, target: int) -> float:
    return float(np.mean(((z - z.mean()) - (y - y.mean())) ** 2))


def dkd(y: Logits, z: Logits, target: int, alpha: float, beta: float) -> float:
    others_y, others_z = np.delete(y, target), np.delete(z, target)
    two_y, two_z = (np.array([one[target], _log_sum_exp(np.delete(one, target))]) for one in (y, z))
    binary = _kl(_log_softmax(two_y), _log_softmax(two_z))
    return alpha * binary + beta * _kl(_log_softmax(others_y), _log_softmax(others_z))


def taid(y: Logits, z: Logits, target: int, t: float) -> float:
    return _kl(_log_softmax(z + t * (y - z)), _log_softmax(z))


def step_by_step(y: Logits, z: Logits, target: int, alpha: float, label_smoothing: float) -> float:
    """Of a label: no domain of the suite holds rationales."""
    return 2 * alpha * cross_entropy(y, z, target, label_smoothing)


def hinge_ranking(y: Logits, z: Logits, target: int, top_k: int, margin: float | None) -> float:
    losses = [
        max(0.0, (y[k] - y[other] if margin is None else margin) - (z[k] - z[other])) for k, other in _pairs(y, top_k)
    ]
    return float(np.mean(losses))


def logistic_ranking(y: Logits, z: Logits, target: int, top_k: int) -> float:
    return float(np.mean([np.logaddexp(0.0, z[other] - z[k]) for k, other in _pairs(y, top_k)]))


def _pairs(y: Logits, top_k: int) -> list[tuple[int, int]]:
    """The teacher's likeliest ids, two by two, the likelier first."""
    return list(combinations(np.argsort(-y)[:top_k].tolist(), 2))


def _log_sum_exp(x: Logits) -> float:
    return float(x.max() + np.log(np.exp(x - x.max()).sum()))


def _log_softmax(x: Logits) -> Logits:
    return x - _log_sum_exp(x)


def _kl(u: Logits, v: Logits) -> float:
    return float(np.exp(u) @ (u - v))


def _log_mix(u: Logits, v: Logits, share: float) -> Logits:
    with np.errstate(divide="ignore"):
        return np.logaddexp(u + np.log(share), v + np.log(1 - share))
