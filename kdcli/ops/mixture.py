"""Several models' distributions as one: log sum_i w_i p_i, or sum_i w_i logits_i (a product of experts).

The first is the ensemble of Hinton et al. 2015, arXiv:1503.02531; the second its "geometric mean", up to a constant.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from kdcli.ops.head import Head

Pool = Literal["probabilities", "logits"]


@torch.no_grad()
def mixed(members: Sequence[tuple[Tensor, Tensor, Head]], pool: Pool) -> Tensor:
    """Logits [..., V] in float32 (float64 with a float64 head) of members (weight [...], hidden [..., D], head).

    Heads are over the same V ids. With `probabilities` the result is normalized wherever weights sum to 1; where all
    are 0 it is 0. A member costs nothing where its weight is 0. One member's logits exist at a time, beside the sum.
    """
    shape, total = members[0][0].shape, None
    heard = torch.zeros(shape.numel(), dtype=torch.bool, device=members[0][0].device)
    for weight, hidden, head in members:
        weight, hidden = weight.flatten(), hidden.reshape(-1, hidden.shape[-1])
        rows = weight.nonzero()[:, 0]
        everywhere = len(rows) == len(weight)
        logits = head(hidden if everywhere else hidden[rows])
        factor = (weight if everywhere else weight[rows]).to(logits.dtype).unsqueeze(-1)
        if pool == "logits":
            logits.mul_(factor)
        else:
            logits.add_(factor.log() - logits.logsumexp(-1, keepdim=True))
        if total is None and everywhere:
            total = logits
        else:
            total = _blank(logits, len(weight), pool) if total is None else total
            _add(total, logits, None if everywhere else rows, pool)
        heard[rows] = True
        del logits
    assert total is not None, "a mixture has members"
    if pool == "probabilities" and not bool(heard.all()):
        total[~heard] = 0.0
    return total.view(*shape, -1)


def _blank(like: Tensor, rows: int, pool: Pool) -> Tensor:
    """The sum of nothing, [rows, V]."""
    return like.new_full((rows, like.shape[-1]), 0.0 if pool == "logits" else -math.inf)


def _add(total: Tensor, part: Tensor, rows: Tensor | None, pool: Pool) -> None:
    """Add `part` to `total`, all of it or its `rows`."""
    if pool == "logits":
        if rows is None:
            total.add_(part)
        else:
            total.index_add_(0, rows, part)
    elif rows is None:
        torch.logaddexp(total, part, out=total)
    else:
        total[rows] = torch.logaddexp(total[rows], part, out=part)
