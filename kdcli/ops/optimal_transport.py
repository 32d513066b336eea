"""Distances of distributions over different vocabularies: sorted probabilities, and Sinkhorn's transport plan."""

from __future__ import annotations

import torch
from torch import Tensor


def sorted_distance(p: Tensor, q: Tensor) -> Tensor:
    """sum |sort(p) - sort(q)| with zeros appended to the shorter: [..., V'], [..., V] -> [...].

    The cheapest way to move p to q when every id is as far from every other (Boizard et al. 2024, eq. 4). Values that
    are equal keep their order (stable), and the slope where they meet is 0.
    """
    p, q = (values.sort(dim=-1, descending=True, stable=True).values for values in (p, q))
    shared = min(p.shape[-1], q.shape[-1])
    common = (p[..., :shared] - q[..., :shared]).abs().sum(-1)
    return common + p[..., shared:].sum(-1) + q[..., shared:].sum(-1)


def sorted_distance_gradient(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """The distance [...] and its gradient q (g - <q, g>) with respect to z where q = softmax(z), [..., V]; g is
    sign(q - p) of the values at equal rank, back in the order of the ids."""
    p = p.sort(dim=-1, descending=True, stable=True).values
    ranked, order = q.sort(dim=-1, descending=True, stable=True)
    shared = min(p.shape[-1], q.shape[-1])
    difference = ranked.clone()
    difference[..., :shared] -= p[..., :shared]
    value = difference.abs().sum(-1) + p[..., shared:].sum(-1)
    sign = torch.zeros_like(q).scatter_(-1, order, difference.sign_())
    return value, sign.sub_(torch.linalg.vecdot(q, sign).unsqueeze(-1)).mul_(q)


def sinkhorn_cost(cost: Tensor, real: Tensor, epsilon: float, iterations: int) -> Tensor:
    """sum P * cost for the plan P that Sinkhorn's iterations make of exp(-cost / epsilon): [E, N, N] -> [E].

    Each iteration scales the rows, then the columns, to sums of 1, so the plan moves as much mass as there are
    columns. In log space, so that no epsilon underflows. `real` [E, N] bool: rows and columns that are not padding,
    which is moved onto itself.
    """
    pairs = real.unsqueeze(-1) & real.unsqueeze(-2)
    itself = torch.eye(cost.shape[-1], dtype=torch.bool, device=cost.device)
    plan = (-cost / epsilon).masked_fill(~pairs, -torch.inf).masked_fill(~pairs & itself, 0.0)
    for _ in range(iterations):
        plan = plan - plan.logsumexp(-1, keepdim=True)
        plan = plan - plan.logsumexp(-2, keepdim=True)
    return (plan.exp() * cost.masked_fill(~pairs, 0.0)).sum((-1, -2))
