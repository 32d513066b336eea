"""The formulas of objectives for different tokenizers, written a second time: float64 numpy, plain loops.

An oracle has the name of its objective's module. `uld` takes one target's logits, as those of `oracles`; the others
take a micro-batch, what both models computed for it, and the settings that they read. A place is a row and a position.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Place = tuple[int, int]


def uld(y: Array, z: Array, target: int) -> float:
    return _sorted_distance(_softmax(y), _softmax(z))


def alm(batch: Any, student: Any, teacher: Any, *, divergence: str, temperature: float) -> Array:
    theirs = teacher.own_logprobs if _foreign(batch) else teacher.logprobs
    values = np.full(batch.mask.shape, np.nan)
    for places, their_places in _spans(batch):
        p, q = (
            math.exp(sum(logprobs[place] for place in of) / temperature)
            for logprobs, of in ((theirs, their_places), (student.logprobs, places))
        )
        values[places[0]] = _between(divergence, np.log([p, 1 - p]), np.log([q, 1 - q]), 0.5)
    return values


def gold(
    batch: Any,
    student: Any,
    teacher: Any,
    *,
    merge: str,
    hybrid: bool,
    matched_weight: float | None,
    divergence: str,
    beta: float,
    temperature: float,
    temperature_scale: str,
    tokenizers: Sequence[Any] | None = None,
) -> Array:
    own, theirs = _distributions(batch, student, teacher, temperature)
    targets = batch.teacher.targets if _foreign(batch) else batch.targets
    values = np.full(batch.mask.shape, np.nan)
    for places, their_places in _spans(batch):
        q, missed_q = _merged(own, places, batch.targets, merge)
        p, missed_p = _merged(theirs, their_places, targets, merge)
        if hybrid:
            if _foreign(batch):
                assert tokenizers is not None, "which ids match is the tokenizers' to say"
                pairs = _equal_tokens(*tokenizers)
            else:
                pairs = {v: v for v in range(len(q))}
            direct = _direct(p, missed_p, q, missed_q, pairs, divergence, beta)
            alone_q = [q[v] for v in range(len(q)) if v not in pairs]
            alone_p = [p[v] for v in range(len(p)) if v not in pairs.values()]
            weight = len(pairs) / len(p) if matched_weight is None else matched_weight
            value = weight * direct + (1 - weight) * _sorted_distance(alone_p, alone_q)
        else:
            value = _sorted_distance(p, q)
        values[places[0]] = _factor(temperature, temperature_scale) * value
    return values


def mined(
    batch: Any,
    student: Any,
    teacher: Any,
    *,
    unmatched: str,
    near: bool,
    temperature: float,
    temperature_scale: str,
    tokenizers: Sequence[Any] | None = None,
) -> Array:
    scale = _factor(temperature, temperature_scale)
    head, their_head = _sizes(batch, student, teacher)
    values = np.full(batch.mask.shape, np.nan)
    for place in _places(batch.mask) if unmatched == "gold" else []:
        z = _logits(student.hidden[place], student.head, head) / temperature
        values[place] = -scale * _log_softmax(z)[batch.targets[place]]
    for places, their_places in _spans(batch):
        if len(places) > 1 or len(their_places) > 1:
            continue
        y = _logits(teacher.hidden[places[0]], teacher.head, their_head) / temperature
        if _foreign(batch):
            assert tokenizers is not None, "which ids match is the tokenizers' to say"
            passes_to = _nearest_tokens(*tokenizers, near=near)
        else:
            passes_to = {v: v for v in range(their_head)}
        ids = sorted(passes_to)
        p = np.zeros(head)
        for i, mass in zip(ids, _softmax(y[ids]), strict=True):
            p[passes_to[i]] += mass
        v = _log_softmax(_logits(student.hidden[places[0]], student.head, head) / temperature)
        values[places[0]] = scale * sum(p[i] * (math.log(p[i]) - v[i]) for i in range(head) if p[i] > 0)
    return values


def dskd(
    batch: Any,
    student: Any,
    teacher: Any,
    *,
    divergence: str,
    temperature: float,
    temperature_scale: str,
    parameters: Mapping[str, Array],
) -> Array:
    scale = _factor(temperature, temperature_scale)
    size, their_size = _sizes(batch, student, teacher)
    values = np.full(batch.mask.shape, np.nan)
    for places, their_places in _spans(batch):
        if len(places) > 1 or len(their_places) > 1:
            continue
        h, theirs = student.hidden[places[0]], teacher.hidden[places[0]]
        mapped = _logits(_map(parameters, "into_student", theirs), student.head, size)
        surprise = -_log_softmax(mapped)[batch.targets[places[0]]]
        z, y = _logits(h, student.head, size), _logits(theirs, teacher.head, their_size)
        own = _between(divergence, _log_softmax(mapped / temperature), _log_softmax(z / temperature), 0.5)
        back = _logits(_map(parameters, "into_teacher", h), teacher.head, their_size)
        other = _kl(_log_softmax(y / temperature), _log_softmax(back / temperature))
        values[places[0]] = surprise + scale * (own + other)
    return values


def dskd_cma(
    batch: Any,
    student: Any,
    teacher: Any,
    *,
    divergence: str,
    temperature: float,
    temperature_scale: str,
    parameters: Mapping[str, Array],
) -> Array:
    scale = _factor(temperature, temperature_scale)
    size, their_size = _sizes(batch, student, teacher)
    hidden = teacher.own_hidden if _foreign(batch) else teacher.hidden
    inputs, targets = _their_tokens(batch)
    values = np.full(batch.mask.shape, np.nan)
    for sequence in range(len(batch.weight)):
        spans = [both for both in _spans(batch) if batch.segment[both[0][0]] == sequence]
        theirs = sorted(place for _, places in spans for place in places)
        mine = [place for place in _places(batch.mask) if batch.segment[place] == sequence]
        if not spans:
            continue
        queries = [
            _map(parameters, "query", np.concatenate([student.embedding[ids[place]] for ids in _own_tokens(batch)]))
            for place in mine
        ]
        followed = np.array([teacher.embedding[targets[place]] for place in theirs])
        before = np.array([teacher.embedding[inputs[place]] for place in theirs])
        keys = np.concatenate([before, followed], 1)
        keys = keys / keys.std(ddof=1)
        states = np.array([hidden[place] for place in theirs])
        carried = states / states.std(ddof=1) + followed / followed.std(ddof=1)
        scores = np.array([[query @ key / math.sqrt(2 * states.shape[1]) for key in keys] for query in queries])
        total = 0.0
        for j, place in enumerate(theirs):
            mapped_back = np.array([_map(parameters, "into_teacher", student.hidden[at]) for at in mine])
            back = _softmax(scores[:, j]) @ mapped_back
            y, z = (_logits(state, teacher.head, their_size) / temperature for state in (hidden[place], back))
            total += scale * _kl(_log_softmax(y), _log_softmax(z))
        for i, place in enumerate(mine):
            state = _softmax(scores[i]) @ np.array([_map(parameters, "into_student", one) for one in carried])
            mapped = _logits(state, student.head, size)
            values[place] = -_log_softmax(mapped)[batch.targets[place]] + total / len(mine)
            if mapped.argmax() == batch.targets[place]:
                z = _logits(student.hidden[place], student.head, size) / temperature
                values[place] += scale * _between(divergence, _log_softmax(mapped / temperature), _log_softmax(z), 0.5)
    return values


def multi_level_ot(
    batch: Any,
    student: Any,
    teacher: Any,
    *,
    top_k: int,
    temperature: float,
    log_weight: float,
    sinkhorn_weight: float,
    sinkhorn_temperature: float,
    sinkhorn_epsilon: float,
    sinkhorn_iterations: int,
) -> Array:
    sizes = _sizes(batch, student, teacher)
    count = min(top_k, *sizes)
    values = np.full(len(batch.weight), np.nan)
    for sequence in range(len(values)):
        places = [
            place
            for place in _places(batch.mask)
            if batch.segment[place] == sequence and (batch.teacher is None or batch.teacher.position[place] >= 0)
        ]
        if not places:
            continue
        columns, softer = [], []
        for model, size in zip((student, teacher), sizes, strict=True):
            logits = np.array([_logits(model.hidden[place], model.head, size) for place in places])
            logits = logits / np.sqrt(logits.var(1, ddof=1, keepdims=True) + 1e-8)
            probabilities = np.array([_softmax(row / temperature) for row in logits])
            best = np.argsort(-probabilities.sum(0), kind="stable")[:count]
            columns.append(probabilities[:, best])
            softer.append(np.array([_softmax(row[best] / sinkhorn_temperature) for row in logits]))
        q, p = columns
        differences = np.abs(q - p).sum(1) - log_weight * (p * np.log(q)).sum(1)
        cost = np.array([[np.abs(u - v).sum() for v in softer[1]] for u in softer[0]])
        plan = np.exp(-cost / sinkhorn_epsilon)
        for _ in range(sinkhorn_iterations):
            plan = plan / plan.sum(1, keepdims=True)
            plan = plan / plan.sum(0, keepdims=True)
        values[sequence] = differences.mean() + sinkhorn_weight * (plan * cost).sum()
    return values


def _foreign(batch: Any) -> bool:
    return batch.teacher is not None and batch.teacher.targets is not None


def _places(mask: NDArray[np.bool_]) -> list[Place]:
    return [(b, t) for b in range(mask.shape[0]) for t in range(mask.shape[1]) if mask[b, t]]


def _spans(batch: Any) -> list[tuple[list[Place], list[Place]]]:
    """Of each span that both models have, the student's targets and the teacher's."""
    view = batch.teacher
    if not _foreign(batch):
        alone = [place for place in _places(batch.mask) if view is None or view.position[place] >= 0]
        return [([place], [place]) for place in alone]
    found: dict[int, tuple[list[Place], list[Place]]] = {}
    for side, (mask, span) in enumerate(((batch.mask, view.span), (view.mask, view.teacher_span))):
        for place in _places(mask):
            if span[place] >= 0:
                found.setdefault(int(span[place]), ([], []))[side].append(place)
    return [both for both in found.values() if both[0] and both[1]]


def _own_tokens(batch: Any) -> tuple[Any, Any]:
    return batch.input_ids, batch.targets


def _their_tokens(batch: Any) -> tuple[Any, Any]:
    """What comes before and at the teacher's targets."""
    view = batch.teacher
    if _foreign(batch):
        return view.input_ids, view.targets
    if view is None:
        return _own_tokens(batch)
    inputs = np.zeros_like(batch.input_ids)
    for b, t in _places(view.position >= 0):
        inputs[b, t] = view.input_ids[b, view.position[b, t]]
    return inputs, batch.targets


def _sizes(batch: Any, student: Any, teacher: Any) -> tuple[int, int]:
    """The vocabularies that are compared: of one tokenizer the ids that both have."""
    own, theirs = student.head.vocab_size, teacher.head.vocab_size
    return (own, theirs) if _foreign(batch) else (min(own, theirs), min(own, theirs))


def _distributions(
    batch: Any, student: Any, teacher: Any, temperature: float
) -> tuple[Callable[[Place], Array], Callable[[Place], Array]]:
    """The next token's distribution at a place, of the student's positions and of the teacher's."""
    size, their_size = _sizes(batch, student, teacher)
    hidden = teacher.own_hidden if _foreign(batch) else teacher.hidden
    return (
        lambda place: _softmax(_logits(student.hidden[place], student.head, size) / temperature),
        lambda place: _softmax(_logits(hidden[place], teacher.head, their_size) / temperature),
    )


def _merged(
    distribution: Callable[[Place], Array], places: list[Place], targets: Any, merge: str
) -> tuple[Array, float]:
    """A span's distribution at its last or first token times the others' probabilities, and 1 - their product."""
    base = places[-1] if merge == "bayesian" else places[0]
    product = math.prod(float(distribution(place)[targets[place]]) for place in places if place != base)
    return product * distribution(base), 1 - product


def _direct(
    p: Array, missed_p: float, q: Array, missed_q: float, pairs: Mapping[int, int], divergence: str, beta: float
) -> float:
    """The divergence over the matched ids, and one symbol for all the rest."""
    rest_q = missed_q + sum(q[v] for v in range(len(q)) if v not in pairs)
    rest_p = missed_p + sum(p[v] for v in range(len(p)) if v not in pairs.values())
    one, other = ([dist[v] for v in ids] for dist, ids in ((p, pairs.values()), (q, pairs.keys())))
    kept = slice(0, None if rest_p > 0 and rest_q > 0 else -1)
    return _between(divergence, np.log([*one, rest_p][kept]), np.log([*other, rest_q][kept]), beta)


def _equal_tokens(student: Any, teacher: Any) -> dict[int, int]:
    """The student's id -> the teacher's of the same token, of tokenizers that write tokens alike."""
    theirs = teacher.get_vocab()
    return {own: theirs[token] for token, own in student.get_vocab().items() if token in theirs}


def _nearest_tokens(student: Any, teacher: Any, *, near: bool) -> dict[int, int]:
    """The teacher's id -> the student's of the same token, or the lowest one edit away of more than two letters."""
    own = student.get_vocab()
    found = {other: mine for mine, other in _equal_tokens(student, teacher).items()}
    for token, other in teacher.get_vocab().items():
        close = [i for known, i in own.items() if min(len(known), len(token)) > 2 and _edits(known, token) == 1]
        if near and other not in found and close:
            found[other] = min(close)
    return found


def _edits(one: str, other: str) -> int:
    if not one or not other:
        return len(one) + len(other)
    if one[0] == other[0]:
        return _edits(one[1:], other[1:])
    return 1 + min(_edits(one[1:], other), _edits(one, other[1:]), _edits(one[1:], other[1:]))


def _logits(hidden: Array, head: Any, size: int) -> Array:
    logits = np.array([hidden @ head.weight[v] for v in range(size)])
    if head.bias is not None:
        logits = logits + head.bias[:size]
    logits = head.scale * logits
    return logits if head.softcap is None else head.softcap * np.tanh(logits / head.softcap)


def _map(parameters: Mapping[str, Array], name: str, vector: Array) -> Array:
    return parameters[f"{name}.weight"] @ vector + parameters[f"{name}.bias"]


def _factor(temperature: float, temperature_scale: str) -> float:
    return temperature**2 if temperature_scale == "t2" else 1.0


def _sorted_distance(p: Sequence[float] | Array, q: Sequence[float] | Array) -> float:
    one, other = (sorted((float(v) for v in values), reverse=True) for values in (p, q))
    size = max(len(one), len(other))
    one, other = (values + [0.0] * (size - len(values)) for values in (one, other))
    return sum(abs(a - b) for a, b in zip(one, other, strict=True))


def _between(which: str, u: Array, v: Array, beta: float) -> float:
    """A divergence of the log-probabilities u of the teacher and v of the student."""
    if which == "forward_kl":
        return _kl(u, v)
    if which == "reverse_kl":
        return _kl(v, u)
    if which == "total_variation":
        return float(np.maximum(np.exp(u) - np.exp(v), 0).sum())
    m = np.log(beta * np.exp(u) + (1 - beta) * np.exp(v))
    return beta * _kl(u, m) + (1 - beta) * _kl(v, m)


def _log_softmax(x: Array) -> Array:
    return x - x.max() - np.log(np.exp(x - x.max()).sum())


def _softmax(x: Array) -> Array:
    return np.exp(_log_softmax(x))


def _kl(u: Array, v: Array) -> float:
    return float(np.exp(u) @ (u - v))
