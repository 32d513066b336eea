"""Losses on what the layers computed, written a second time: float64 numpy, one position after another.

An oracle has the name of its objective's module. `batch`, `student` and `teacher` hold numpy arrays under the names of
kdcli.api; `parameters` are the objective's, by name. What is not a unit of the objective is NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import permutations
from types import SimpleNamespace

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Record = SimpleNamespace
Layers = str | list[tuple[int, int]]


def hidden_mse(
    batch: Record, student: Record, teacher: Record, *, layers: Layers, normalize: str, parameters: Mapping[str, Array]
) -> Array:
    def distance(a: Array, b: Array) -> float:
        if normalize == "unit":
            a, b = np.sqrt(len(a)) * a / np.linalg.norm(a), np.sqrt(len(b)) * b / np.linalg.norm(b)
        total = sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / len(b)
        return total * len(b) / sum(y**2 for y in b) if normalize == "teacher" else total

    return _of_states(batch, student, teacher, layers, parameters, distance)


def hidden_cosine(
    batch: Record, student: Record, teacher: Record, *, layers: Layers, parameters: Mapping[str, Array]
) -> Array:
    def distance(a: Array, b: Array) -> float:
        return 1 - float(a @ b) / float(np.sqrt((a @ a) * (b @ b)))

    return _of_states(batch, student, teacher, layers, parameters, distance)


def attention(batch: Record, student: Record, teacher: Record, *, layers: Layers, distance: str) -> Array:
    values = np.full(batch.mask.shape, np.nan)
    for b, t in _targets(batch):
        keys = _visible(batch, b, t)
        total = []
        for i, j in _pairs(layers, len(student.attentions), len(teacher.attentions)):
            ours, theirs = student.attentions[i - 1][b, :, t][:, keys], teacher.attentions[j - 1][b, :, t][:, keys]
            if len(ours) != len(theirs):
                ours, theirs = ours.mean(0)[None], theirs.mean(0)[None]
            total += [_row_distance(q, p, distance) for q, p in zip(ours, theirs, strict=True)]
        values[b, t] = np.mean(total)  # every pair has as many heads
    return values


def _row_distance(q: Array, p: Array, distance: str) -> float:
    if distance == "mse":
        return float(np.mean((q - p) ** 2))
    least = np.finfo(np.float32).tiny
    return sum(y * float(np.log(max(y, least) / max(x, least))) + x - y for x, y in zip(q, p, strict=True))


def minilm(
    batch: Record, student: Record, teacher: Record, *, layers: Layers, relations: list[str], heads: int | None
) -> Array:
    values = np.full(batch.mask.shape, np.nan)
    for b, t in _targets(batch):
        keys, total = _visible(batch, b, t), []
        for i, j in _pairs(layers, len(student.relations), len(teacher.relations)):
            ours, theirs = student.relations[i - 1], teacher.relations[j - 1]
            number = heads or int(np.gcd(ours.keys.shape[2], theirs.keys.shape[2]))
            for kind in relations:
                rows = []
                for side in (ours, theirs):
                    vectors = getattr(side, kind)[b].reshape(batch.mask.shape[1], number, -1)
                    size = vectors.shape[-1]
                    rows.append([[vectors[t, a] @ vectors[k, a] / size**0.5 for k in keys] for a in range(number)])
                for z, y in zip(*rows, strict=True):
                    q, p = _log_softmax(np.array(z)), _log_softmax(np.array(y))
                    total.append(float(np.exp(p) @ (p - q)))
        values[b, t] = np.mean(total)
    return values


def rkd(
    batch: Record,
    student: Record,
    teacher: Record,
    *,
    layers: Layers,
    distance_weight: float,
    angle_weight: float,
    points: int,
) -> Array:
    def compared(a: Array, b: Array) -> float:
        n = len(a)
        chosen = range(n) if n <= points else [i * (n - 1) // (points - 1) for i in range(points)]
        a, b = a[list(chosen)], b[list(chosen)]
        pairs, triples = list(permutations(range(len(a)), 2)), list(permutations(range(len(a)), 3))
        lengths = [np.array([np.linalg.norm(x[i] - x[j]) for i, j in pairs]) for x in (a, b)]
        cosines = [np.array([_cosine(x[i] - x[j], x[k] - x[j]) for i, j, k in triples]) for x in (a, b)]
        distances = _huber(lengths[0] / lengths[0].mean() - lengths[1] / lengths[1].mean())
        return distance_weight * distances + angle_weight * _huber(cosines[0] - cosines[1])

    return _of_sequences(batch, student, teacher, layers, 3, compared)


def cka(batch: Record, student: Record, teacher: Record, *, layers: Layers, unbiased: bool) -> Array:
    def hsic(k: Array, l: Array) -> float:  # noqa: E741
        n = len(k)
        if not unbiased:
            centre = np.eye(n) - np.ones((n, n)) / n
            return float(np.trace(k @ centre @ l @ centre))
        k, l = k - np.diag(np.diag(k)), l - np.diag(np.diag(l))  # noqa: E741
        ones = np.ones(n)
        corner = (ones @ k @ ones) * (ones @ l @ ones) / ((n - 1) * (n - 2))
        return float(np.trace(k @ l) + corner - 2 / (n - 2) * (ones @ k @ l @ ones))

    def compared(a: Array, b: Array) -> float:
        k, l = a @ a.T, b @ b.T  # noqa: E741
        return 1 - hsic(k, l) / float(np.sqrt(hsic(k, k) * hsic(l, l)))

    return _of_sequences(batch, student, teacher, layers, 4, compared)


def ted(
    batch: Record, student: Record, teacher: Record, *, layers: Layers, stage: str, parameters: Mapping[str, Array]
) -> Array:
    values = np.full(batch.mask.shape, np.nan)
    for b, t in _targets(batch):
        total = 0.0
        pairs = _pairs(layers, len(student.hidden_states) - 1, len(teacher.hidden_states) - 1)
        for i, j in pairs:
            filtered = []
            for who, states, layer in (("student", student, i), ("teacher", teacher, j)):
                state = states.hidden_states[layer][b, t]
                filtered.append(parameters[f"{who}.{i}_{j}"] @ (state / np.sqrt(np.mean(state**2))))
            if stage == "distill":
                total += float(np.mean((filtered[0] - filtered[1]) ** 2))
            else:
                total -= sum(_log_softmax(_logits(teacher.head, one))[batch.targets[b, t]] for one in filtered)
        values[b, t] = total / len(pairs)
    return values


# ---------------------------------------------------------------------------------------------------- what they share


def _of_states(
    batch: Record,
    student: Record,
    teacher: Record,
    layers: Layers,
    parameters: Mapping[str, Array],
    distance: Callable[[Array, Array], float],
) -> Array:
    values = np.full(batch.mask.shape, np.nan)
    pairs = _pairs(layers, len(student.hidden_states) - 1, len(teacher.hidden_states) - 1)
    for b, t in _targets(batch):
        found = []
        for i, j in pairs:
            ours, theirs = student.hidden_states[i][b, t], teacher.hidden_states[j][b, t]
            if f"projector.{i}_{j}" in parameters:
                ours = parameters[f"projector.{i}_{j}"] @ ours
            found.append(distance(ours, theirs))
        values[b, t] = sum(found) / len(pairs)
    return values


def _of_sequences(
    batch: Record,
    student: Record,
    teacher: Record,
    layers: Layers,
    least: int,
    compared: Callable[[Array, Array], float],
) -> Array:
    values = np.full(len(batch.weight), np.nan)
    pairs = _pairs(layers, len(student.hidden_states) - 1, len(teacher.hidden_states) - 1)
    for e in range(len(values)):
        places = [(b, t) for b, t in _targets(batch) if batch.segment[b, t] == e]
        if len(places) < least or (batch.rejected is not None and batch.rejected[e]):
            continue
        found = [
            compared(
                np.array([student.hidden_states[i][place] for place in places]),
                np.array([teacher.hidden_states[j][place] for place in places]),
            )
            for i, j in pairs
        ]
        values[e] = sum(found) / len(pairs)
    return values


def _pairs(layers: Layers, student: int, teacher: int) -> list[tuple[int, int]]:
    if layers == "last":
        return [(student, teacher)]
    if layers == "uniform":
        return [(i, max(1, int(np.floor(i * teacher / student + 0.5)))) for i in range(1, student + 1)]
    return [(int(i), int(j)) for i, j in layers]


def _targets(batch: Record) -> Iterator[tuple[int, int]]:
    """Supervised targets that the teacher scored, row by row."""
    for b, t in zip(*np.nonzero(batch.mask), strict=True):
        if batch.teacher is None or batch.teacher.position[b, t] >= 0:
            yield int(b), int(t)


def _visible(batch: Record, b: int, t: int) -> list[int]:
    """Positions of the same sequence, up to t."""
    return [k for k in range(t + 1) if batch.segment[b, k] == batch.segment[b, t]]


def _cosine(a: Array, b: Array) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def _huber(differences: Array) -> float:
    return float(np.mean([0.5 * d * d if abs(d) < 1 else abs(d) - 0.5 for d in differences]))


def _log_softmax(x: Array) -> Array:
    return x - x.max() - np.log(np.exp(x - x.max()).sum())


def _logits(head: Record, hidden: Array) -> Array:
    z = head.weight[: head.vocab_size] @ hidden
    if head.bias is not None:
        z = z + head.bias[: head.vocab_size]
    z = z * head.scale
    return z if head.softcap is None else head.softcap * np.tanh(z / head.softcap)
