"""Formulas of losses on logits that see a whole micro-batch, a second time: float64 numpy, in plain loops.

Letters: N targets of a sequence, V vocabulary.
"""

from __future__ import annotations

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
        targets = [1 - np.corrcoef(q[n], p[n])[0, 1] for n in range(len(places))]
        ids = [1 - np.corrcoef(q[:, v], p[:, v])[0, 1] for v in range(size)] if len(places) > 1 else [0.0]
        values[sequence] = beta * np.mean(targets) + gamma * np.mean(ids)
    return values * (temperature**2 if temperature_scale == "t2" else 1.0)


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
