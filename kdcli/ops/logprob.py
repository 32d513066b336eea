"""Log-probabilities in forms that stay finite: log(1 - p), log-odds, and discounted sums of what follows."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, with finite gradients (Maechler 2012).

    log(-expm1(x)) above -log 2, where exp(x) is near 1; log1p(-exp(x)) below, where it is near 0.
    """
    near = x > -math.log(2.0)
    far = torch.where(near, -1.0, x)  # at its pole the branch not taken would still give NaN gradients
    return torch.where(near, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(far)))


def log_odds(logprob: Tensor) -> Tensor:
    """log p / (1 - p) of log p <= 0; p is held 1e-7 below 1, float32's resolution, so that the odds stay finite."""
    held = logprob.clamp(max=-1e-7)
    return held - log1mexp(held)


def discounted_sums(values: Tensor, discount: float) -> Tensor:
    """sum_{i >= t} discount^(i - t) values_i along the last axis, [..., L] -> [..., L], in log2(L) passes.

    After each pass an entry is the sum of twice as many terms, so that nothing grows for any discount in [0, 1].
    """
    sums, reach = values, 1
    while reach < values.shape[-1]:
        sums = sums + discount**reach * torch.nn.functional.pad(sums[..., reach:], (0, reach))
        reach *= 2
    return sums
