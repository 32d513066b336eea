"""The formulas of losses of whole answers, written a second time: float64 numpy, one answer after another.

An oracle has the name of its objective's module. dpkd takes one target, as in `oracles`. The others take `batch`,
`student` and `teacher` (the fields of the api's records, as numpy arrays), the settings that they read, and the
`parameters` that the objective has learned; they return one number per target [B, T], answer [E] or group [G], NaN
where the objective has none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Pair = tuple[int, int]  # better, worse

# ------------------------------------------------------------------------------------------------ one target


def dpkd(
    y: Array,
    z: Array,
    target: int,
    variant: str = "dpo",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    penalty: float = 50.0,
) -> float:
    log_p, log_q = _log_softmax(y), _log_softmax(z)
    chosen, rejected = int(np.argmax(y)), int(np.argmax(z))
    student = log_q[chosen] - log_q[rejected]
    reference = log_p[chosen] - log_p[rejected]
    if variant == "ipo":
        return float((student - reference - 1 / (2 * beta)) ** 2)
    wins = beta * (student - reference)
    loss = (1 - label_smoothing) * _softplus(-wins) + label_smoothing * _softplus(wins)
    if variant == "dpop" and log_p[chosen] > log_q[chosen]:
        loss += penalty * float(log_p[chosen] - log_q[chosen])
    return loss


def distillm2(
    batch: Any,
    student: Any,
    teacher: Any,
    *,
    alpha: float = 0.1,
    beta: float = 1.0,
    temperature: float = 1.0,
    temperature_scale: str = "none",
) -> Array:
    """Of a chunk of targets, as it matters who wrote each."""
    result = np.full(batch.targets.shape, np.nan)
    for place in np.ndindex(result.shape):
        u, v = (_log_softmax(np.asarray(model.logits[place]) / temperature) for model in (teacher, student))
        rejected = batch.rejected is not None and bool(batch.rejected[batch.segment[place]])
        own, other, weight = (v, u, beta) if rejected else (u, v, 2 - beta)
        total = 0.0
        for a, b in zip(own, other, strict=True):
            mixture = b if alpha == 0 else np.logaddexp(a + math.log(alpha), b + math.log1p(-alpha))
            total += math.exp(a) * (a - mixture)
        result[place] = weight * total * (temperature**2 if temperature_scale == "t2" else 1)
    return result


# ------------------------------------------------------------------------------------------------ of preference


def dpo(
    batch: Any,
    student: Any,
    teacher: Any,
    *,
    answers: str = "pairs",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    reference: str = "student",
    length_normalize: bool = False,
    parameters: Mapping[str, Array] | None = None,
) -> Array:
    ratio = _log_ratios(batch, student, teacher, reference, length_normalize)

    def loss(better: int, worse: int) -> float:
        wins = beta * (ratio[better] - ratio[worse])
        return (1 - label_smoothing) * _softplus(-wins) + label_smoothing * _softplus(wins)

    return _mean_of_pairs(batch, answers, loss)


def ipo(
    batch: Any,
    student: Any,
    teacher: Any,
    *,
    answers: str = "pairs",
    beta: float = 0.1,
    reference: str = "student",
    length_normalize: bool = False,
    parameters: Mapping[str, Array] | None = None,
) -> Array:
    ratio = _log_ratios(batch, student, teacher, reference, length_normalize)
    return _mean_of_pairs(batch, answers, lambda better, worse: (ratio[better] - ratio[worse] - 0.5 / beta) ** 2)


def kto(
    batch: Any,
    student: Any,
    teacher: Any,
    *,
    answers: str = "scores",
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    threshold: float = 0.0,
    baseline: str = "none",
    reference: str = "student",
    length_normalize: bool = False,
    parameters: Mapping[str, Array] | None = None,
) -> Array:
    ratio = _log_ratios(batch, student, teacher, reference, length_normalize)
    places, merits = _places(batch), _merits(batch, answers)
    result = np.full(len(ratio), np.nan)
    for group in _groups(batch):
        for i in group:
            merit = merits[i]
            if merit is None or not places[i]:
                continue
            others = [ratio[j] for j in group if j != i and places[j]]
            base = max(0.0, sum(others) / len(others)) if others and baseline == "group" else 0.0
            good = merit == 0 if answers == "pairs" else merit > threshold
            gain = beta * (ratio[i] - base)
            if good:
                result[i] = desirable_weight * (1 - _sigmoid(gain))
            else:
                result[i] = undesirable_weight * (1 - _sigmoid(-gain))
    return result


def orpo(
    batch: Any,
    student: Any,
    teacher: Any,
    *,
    answers: str = "pairs",
    alpha: float = 0.1,
    parameters: Mapping[str, Array] | None = None,
) -> Array:
    mean = _scores(batch, student.logprobs, 1.0)

    def log_odds(x: float) -> float:
        return x - math.log(-math.expm1(x))

    def loss(better: int, worse: int) -> float:
        return -mean[better] + alpha * _softplus(log_odds(mean[worse]) - log_odds(mean[better]))

    return _mean_of_pairs(batch, answers, loss)


def simpo(
    batch: Any,
    student: Any,
    teacher: Any,
    *,
    answers: str = "pairs",
    beta: float = 2.0,
    margin: float = 0.5,
    parameters: Mapping[str, Array] | None = None,
) -> Array:
    mean = _scores(batch, student.logprobs, 1.0)
    return _mean_of_pairs(
        batch, answers, lambda better, worse: _softplus(-beta * (mean[better] - mean[worse] - margin / beta))
    )


def slic(
    batch: Any,
    student: Any,
    teacher: Any,
    *,
    answers: str = "pairs",
    margin: float = 1.0,
    sft_weight: float = 0.1,
    length_normalize: bool = False,
    parameters: Mapping[str, Array] | None = None,
) -> Array:
    log_pi = _scores(batch, student.logprobs, float(length_normalize))
    return _mean_of_pairs(
        batch,
        answers,
        lambda better, worse: max(0.0, margin + log_pi[worse] - log_pi[better]) - sft_weight * log_pi[better],
    )


# ----------------------------------------------------------------------------------------------- of whole groups


def rrhf(
    batch: Any,
    student: Any,
    teacher: Any,
    *,
    answers: str = "scores",
    rank_weight: float = 1.0,
    length_penalty: float = 1.0,
    parameters: Mapping[str, Array] | None = None,
) -> Array:
    score, mean = (_scores(batch, student.logprobs, power) for power in (length_penalty, 1.0))
    result = []
    for pairs in _pairs(batch, answers):
        if not pairs:
            result.append(math.nan)
            continue
        hinges = sum(score[worse] - score[better] for better, worse in pairs if score[worse] > score[better])
        result.append(rank_weight * hinges - mean[_best(pairs)])
    return np.array(result)


def pro(
    batch: Any,
    student: Any,
    teacher: Any,
    *,
    answers: str = "scores",
    sft_weight: float = 0.05,
    score_temperature: bool = True,
    parameters: Mapping[str, Array] | None = None,
) -> Array:
    total, mean = (_scores(batch, student.logprobs, power) for power in (0.0, 1.0))
    merits, places = _merits(batch, answers), _places(batch)
    result = []
    for group, pairs in zip(_groups(batch), _pairs(batch, answers), strict=True):
        if not pairs:
            result.append(math.nan)
            continue
        loss = 0.0
        for k in sorted({better for better, _ in pairs}):
            rivals = [worse for better, worse in pairs if better == k]
            gaps = [float(merits[k] - merits[i]) if score_temperature else 1.0 for i in rivals]
            own = mean[k] * max(gaps)
            loss += _log_sum_exp(np.array([own, *(mean[i] * gap for i, gap in zip(rivals, gaps, strict=True))])) - own
        size = sum(merits[i] is not None and bool(places[i]) for i in group)
        result.append(loss - sft_weight * (size - 1) ** 2 * total[_best(pairs)])
    return np.array(result)


def listwise(
    batch: Any,
    student: Any,
    teacher: Any,
    *,
    answers: str = "scores",
    scores: str = "data",
    temperature: float = 1.0,
    student_temperature: float = 1.0,
    length_penalty: float = 1.0,
    parameters: Mapping[str, Array] | None = None,
) -> Array:
    own = _scores(batch, student.logprobs, length_penalty)
    merits, places = _merits(batch, answers), _places(batch)
    wanted: Any = merits if scores == "data" else _scores(batch, teacher.logprobs, length_penalty)
    result = []
    for group in _groups(batch):
        known = [i for i in group if places[i] and merits[i] is not None]
        if len(known) < 2:
            result.append(math.nan)
            continue
        u = _log_softmax(np.array([wanted[i] / temperature for i in known]))
        v = _log_softmax(np.array([own[i] / student_temperature for i in known]))
        result.append(float(np.exp(u) @ (u - v)))
    return np.array(result)


# -------------------------------------------------------------------------------------------- of hidden states


def reward_model(
    batch: Any,
    student: Any,
    teacher: Any,
    *,
    answers: str = "pairs",
    center: float = 0.0,
    parameters: Mapping[str, Array],
) -> Array:
    read, value = _read(batch), np.asarray(parameters["value"], dtype=np.float64)
    rewards = [float(student.hidden[places[-1]] @ value) if places else 0.0 for places in read]

    def loss(better: int, worse: int) -> float:
        return _softplus(rewards[worse] - rewards[better]) + center * (rewards[better] + rewards[worse]) ** 2

    return _mean_of_pairs(batch, answers, loss, read)


def contrastive(
    batch: Any,
    student: Any,
    teacher: Any,
    *,
    answers: str = "pairs",
    anchor: str = "prompt",
    pooling: str = "mean",
    temperature: float = 0.02,
    parameters: Mapping[str, Array] | None = None,
) -> Array:
    def embedding(places: list[tuple[int, int]]) -> Array:
        states = np.array([student.hidden[place] for place in places], dtype=np.float64)
        vector = states[-1] if pooling == "last" else states.sum(0) / len(states)
        return vector / math.sqrt(float(vector @ vector))

    texts = _read(batch) if anchor == "prompt" else _texts(batch)
    queries: list[Any] = [None] * len(_groups(batch))
    if anchor == "top":
        for g, pairs in enumerate(_pairs(batch, answers, texts)):
            if pairs:
                queries[g] = texts[_best(pairs)]
                texts[_best(pairs)] = []
    result = []
    for query_text, pairs in zip(queries, _pairs(batch, answers, texts), strict=True):
        if not pairs:
            result.append(math.nan)
            continue
        best = _best(pairs)
        query = embedding(_prompts(batch)[best] if query_text is None else query_text)
        rivals = [best, *(worse for better, worse in pairs if better == best)]
        similar = np.array([query @ embedding(texts[i]) / temperature for i in rivals])
        result.append(_log_sum_exp(similar) - similar[0])
    return np.array(result)


# ------------------------------------------------------------------------------------------------- on-policy


def policy_gradient(
    batch: Any,
    student: Any,
    teacher: Any,
    *,
    coef: float | None = 1.0,
    reward_coef: float | None = None,
    discount: float = 0.0,
    own_reward: bool = True,
    length_norm: bool = False,
    reward_clip: float | None = None,
    normalize: str = "none",
    clip: float | None = None,
    is_clip: float | None = None,
    parameters: Mapping[str, Array] | None = None,
) -> Array:
    result = np.full(batch.mask.shape, np.nan)
    for places in _places(batch):
        rewards = []
        for place in places:
            reward = 0.0 if coef is None else coef * float(teacher.logprobs[place] - student.logprobs[place])
            rewards.append(reward if reward_clip is None else max(-reward_clip, min(reward_clip, reward)))
        advantages = []
        for t in range(len(rewards)):
            following = range(t if own_reward else t + 1, len(rewards))
            total = sum(discount ** (i - t) * rewards[i] for i in following)
            advantages.append(total / max(1, len(following)) if length_norm else total)
        if normalize != "none" and advantages:
            mean = sum(advantages) / len(advantages)
            spread = sum((a - mean) ** 2 for a in advantages) / len(advantages)
            scale = 1 / math.sqrt(spread + 1e-8) if normalize == "whiten" else 1.0
            advantages = [(a - mean) * scale for a in advantages]
        if reward_coef is not None and places:
            whole = reward_coef * float(teacher.reward[batch.segment[places[0]]])
            advantages = [advantage + whole for advantage in advantages]
        for place, advantage in zip(places, advantages, strict=True):
            now = float(student.logprobs[place])
            before = now if batch.old_logprobs is None else float(batch.old_logprobs[place])
            rho = math.exp(max(-20.0, min(20.0, now - before)))
            value = -advantage * (rho if is_clip is None else min(rho, is_clip))
            if clip is not None:
                value = max(value, -advantage * max(1 - clip, min(1 + clip, rho)))
            result[place] = value
    return result


# ------------------------------------------------------------------------------------------------------ parts


def _groups(batch: Any) -> list[list[int]]:
    """The sequences of each group."""
    number = len(batch.weight)
    index = range(number) if batch.group_index is None else [int(g) for g in batch.group_index]
    return [[i for i in range(number) if index[i] == g] for g in range(1 + max(index))]


def _in_pair(batch: Any) -> list[bool]:
    """Whether each sequence is of a preference pair."""
    found = [False] * len(batch.weight)
    for group in _groups(batch):
        if batch.rejected is not None and any(batch.rejected[i] for i in group):
            for i in group:
                found[i] = True
    return found


def _merits(batch: Any, answers: str) -> list[Any]:
    """How good each sequence is: 0 or -1 of a pair, or any other's score; None for what is not asked for."""
    result: list[Any] = []
    for i, of_pair in enumerate(_in_pair(batch)):
        if answers == "pairs":
            result.append((-1.0 if batch.rejected[i] else 0.0) if of_pair else None)
        else:
            result.append(None if of_pair else batch.score[i])
    return result


def _places(batch: Any) -> list[list[tuple[int, int]]]:
    """Where each sequence's supervised targets are, in order."""
    found: list[list[tuple[int, int]]] = [[] for _ in batch.weight]
    for b in range(batch.mask.shape[0]):
        for t in range(batch.mask.shape[1]):
            if batch.mask[b, t]:
                found[int(batch.segment[b, t])].append((b, t))
    return found


def _texts(batch: Any) -> list[list[tuple[int, int]]]:
    """Where each sequence's tokens are."""
    found: list[list[tuple[int, int]]] = [[] for _ in batch.weight]
    for b in range(batch.mask.shape[0]):
        for t in range(batch.mask.shape[1]):
            if batch.segment[b, t] >= 0 and batch.attention_mask[b, t]:
                found[int(batch.segment[b, t])].append((b, t))
    return found


def _read(batch: Any) -> list[list[tuple[int, int]]]:
    """Where each sequence's supervised targets have become input: one position later, where there is one."""
    return [
        [(b, t + 1) for b, t in places if (b, t + 1) in text]
        for places, text in zip(_places(batch), _texts(batch), strict=True)
    ]


def _prompts(batch: Any) -> list[list[tuple[int, int]]]:
    """Where each sequence's tokens before its first supervised target are."""
    return [
        [place for place in text if places and place <= places[0]]
        for places, text in zip(_places(batch), _texts(batch), strict=True)
    ]


def _pairs(batch: Any, answers: str, places: list[list[tuple[int, int]]] | None = None) -> list[list[Pair]]:
    """Per group every (better, worse), of sequences that have `places`: by default supervised targets."""
    merits, places = _merits(batch, answers), places or _places(batch)
    result = []
    for group in _groups(batch):
        known = [i for i in group if merits[i] is not None and places[i]]
        result.append([(i, j) for i in known for j in known if merits[i] > merits[j]])
    return result


def _mean_of_pairs(batch: Any, answers: str, loss: Any, places: list[list[tuple[int, int]]] | None = None) -> Array:
    result = []
    for pairs in _pairs(batch, answers, places):
        losses = [loss(better, worse) for better, worse in pairs]
        result.append(sum(losses) / len(losses) if losses else math.nan)
    return np.array(result)


def _best(pairs: list[Pair]) -> int:
    """The first sequence that is better than another and worse than none."""
    beaten = {worse for _, worse in pairs}
    return min(better for better, _ in pairs if better not in beaten)


def _scores(batch: Any, logprobs: Any, power: float) -> list[float]:
    """Each answer's log-probability / its number of targets ^ power."""
    return [sum(float(logprobs[place]) for place in places) / max(1, len(places)) ** power for places in _places(batch)]


def _log_ratios(batch: Any, student: Any, teacher: Any, reference: str, length_normalize: bool) -> list[float]:
    power = float(length_normalize)
    own = _scores(batch, student.logprobs, power)
    if reference == "none":
        return own
    other = teacher.reference_logprobs if reference == "student" else teacher.logprobs
    return [a - b for a, b in zip(own, _scores(batch, other, power), strict=True)]


def _sigmoid(x: float) -> float:
    return math.exp(-_softplus(-x))


def _softplus(x: float) -> float:
    """log(1 + e^x) = -log sigmoid(-x)."""
    return max(float(x), 0.0) + math.log1p(math.exp(-abs(float(x))))


def _log_sum_exp(x: Array) -> float:
    return float(x.max() + np.log(np.exp(x - x.max()).sum()))


def _log_softmax(x: Array) -> Array:
    return x - _log_sum_exp(x)
