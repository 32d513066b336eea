"""What domains are compared by: functions of numbers per domain (dictionaries), one number per domain out.

Losses are nats per target, or nats per byte where the models' tokenizers differ. Sources stand at the options that use
a function, in this package.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

LARGEST = 600.0  # the largest exponent taken: e^600 times any setting is still finite

Values = Mapping[str, float]


def perplexity_ratio(student: Values, teacher: Values) -> dict[str, float]:
    """perplexity_student / perplexity_teacher = exp(l_S - l_T), at most e^600. Computed from losses, so that
    perplexities that overflow still have a ratio. DDK."""
    return {name: math.exp(min(loss - teacher[name], LARGEST)) for name, loss in student.items()}


def loss_gap(losses: Values, reference: Values, *, clip: bool = False) -> dict[str, float]:
    """l - l_ref in nats; `clip` takes 0 where it is negative: DoReMi's excess loss. Sheared-LLaMA, DRPruning."""
    gaps = {name: loss - reference[name] for name, loss in losses.items()}
    return {name: max(0.0, gap) for name, gap in gaps.items()} if clip else gaps


def remaining(losses: Values, began: Values, target: Values) -> dict[str, float]:
    """(l_t - l_target) / (l_0 - l_target): 1 at the beginning, 0 at the target, so large where learning is slow.
    0 where a domain began at its target or below it: there is nothing left to learn. Velocitune."""
    return {
        name: (loss - target[name]) / (began[name] - target[name]) if began[name] > target[name] else 0.0
        for name, loss in losses.items()
    }


def ratio_to_start(now: Values, began: Values, least: float) -> dict[str, float]:
    """now / max(began, least): the share of a gap that is left. D3-MOPD, Open-MOPD."""
    return {name: max(0.0, value) / max(began[name], least) for name, value in now.items()}


def descent(history: Sequence[Values], least: float) -> dict[str, float]:
    """How fast a number falls: the mean over steps of the history, oldest first, of (older - newer) /
    max(older, least), and 0 where it rises. D3-MOPD's velocity. Of a single entry it is 0."""
    steps = list(pairwise(history))
    return {
        name: max(0.0, math.fsum((old[name] - new[name]) / max(old[name], least) for old, new in steps) / len(steps))
        if steps
        else 0.0
        for name in history[-1]
    }


def product(left: Values, right: Values) -> dict[str, float]:
    """left x right."""
    return {name: value * right[name] for name, value in left.items()}


def over_largest(values: Values) -> dict[str, float]:
    """Divided by the largest; all 0 where that is not positive."""
    largest = max(values.values(), default=0.0)
    return {name: value / largest if largest > 0 else 0.0 for name, value in values.items()}


def clamp(values: Values, least: float, most: float) -> dict[str, float]:
    """Held between `least` and `most`."""
    return {name: min(max(value, least), most) for name, value in values.items()}


def ema(last: Values | None, new: Values, decay: float) -> dict[str, float]:
    """decay x last + (1 - decay) x new; `new` where there is no last."""
    known = last or {}
    return {name: decay * known.get(name, value) + (1 - decay) * value for name, value in new.items()}
