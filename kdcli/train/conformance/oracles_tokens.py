"""Formulas of losses on logits that read more of the batch than a target, a second time: float64, in plain loops."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def dist(
    batch: Any,
    student: Any,
    teacher: Any,
    *,
    beta: float,
    gamma: float,
    temperature: float,
    temperature_scale: str,
) -> Array:
    """[E]; NaN where a sequence has no target."""
    values = np.full(len(batch.weight), np.nan)
    size = min(student.head.vocab_size, teacher.head.vocab_size)
    for sequence in range(len(values)):
        places = np.argwhere(batch.mask & (batch.segment == sequence))
        if not len(places):
            continue
        q, p = (
            np.array([_softmax(_logits(model.head, model.hidden[b, t])[:size] / temperature) for b, t in places])
            for model in (student, teacher)
        )
        targets = [_unlike(q[n], p[n]) for n in range(len(places))]
        ids = [_unlike(q[:, v], p[:, v]) for v in range(size)]
        values[sequence] = beta * np.mean(targets) + gamma * np.mean(ids)
    return values * (temperature**2 if temperature_scale == "t2" else 1.0)


def sampled(
    batch: Any,
    student: Any,
    teacher: Any,
    *,
    samples: int,
    tau: float,
    seed: int,
    temperature: float,
    temperature_scale: str,
) -> Array:
    """[1, N]: every draw by itself, in whole numbers without a sign."""
    values = np.zeros(batch.targets.shape)
    for n in range(batch.targets.shape[1]):
        name = f"{seed}/{batch.row[batch.segment[0, n]]}"
        key = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
        for number in (batch.input_ids[0, n], batch.targets[0, n]):
            key = _splitmix(key ^ _splitmix(int(number) + _GOLDEN))
        u, v = (x - x.max() for x in (model.logits[0, n] / temperature for model in (teacher, student)))
        log_p, log_q = (x - np.log(np.exp(x).sum()) for x in (u, v))
        proposal = _softmax(tau * log_p)
        drawn = []
        for j in range(samples):
            at = (j + (_splitmix(key + (j + 1) * _GOLDEN) >> 11) / 2**53) / samples
            drawn.append(next(i for i, passed in enumerate(np.cumsum(proposal)) if passed > at))
        weights = _softmax(np.array([log_p[i] - tau * log_p[i] for i in drawn]))
        values[0, n] = -sum(w * log_q[i] for w, i in zip(weights, drawn, strict=True))
    return values * (temperature**2 if temperature_scale == "t2" else 1.0)


def _splitmix(x: int) -> int:
    """The finalizer of splitmix64, in whole numbers without a sign."""
    x %= 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


_GOLDEN = 0x9E3779B97F4A7C15


def _unlike(x: Array, y: Array) -> float:
    """1 - Pearson's correlation, less where both hardly vary, and 0 where either does not."""
    u, v = x - x.mean(), y - y.mean()
    lengths = [np.sqrt(w @ w) for w in (u, v)]
    if any(short <= 1e-5 * np.sqrt(w @ w) for short, w in zip(lengths, (x, y), strict=True)):
        return 0.0
    norms = lengths[0] * lengths[1]
    return float(1 - (u @ v + 1e-8) / (norms + 1e-8))


def _logits(head: Any, hidden: Array) -> Array:
    """[D] -> [V]."""
    logits = head.weight @ hidden
    if head.bias is not None:
        logits = logits + head.bias
    logits = head.scale * logits
    return logits if head.softcap is None else head.softcap * np.tanh(logits / head.softcap)


def _softmax(x: Array) -> Array:
    e = np.exp(x - x.max())
    return e / e.sum()
