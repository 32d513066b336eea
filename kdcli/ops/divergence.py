"""Divergences of log-probabilities: p is the teacher, q the student, natural logarithm, no reduction, no T squared.

Every function maps log_p, log_q [..., S] (each sums to one over S, which is the vocabulary or a common support of
K + 1 symbols) to values [...]. Ids of probability zero (-inf) must be cut away before (METHODS D14).

`*_gradient` are closed forms (METHODS section 9): the value and its gradient with respect to the student's logits
z, where log_q = log_softmax(z): q * (g - <q, g>) with g = d value / d q.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

ValueAndGradient = tuple[Tensor, Tensor]  # [...], [..., S]


def forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) in nats, the full divergence and not a cross-entropy: zero at p = q."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def forward_kl_gradient(log_p: Tensor, log_q: Tensor) -> ValueAndGradient:
    """d KL(p || q) / dz = q - p."""
    p = log_p.exp()
    terms = (log_p - log_q).mul_(p)
    value = terms.sum(-1)
    return value, torch.exp(log_q, out=terms).sub_(p)


def reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(q || p) in nats."""
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def reverse_kl_gradient(log_p: Tensor, log_q: Tensor) -> ValueAndGradient:
    """d KL(q || p) / dz = q (log q - log p - KL(q || p))."""
    q = log_q.exp()
    terms = (log_q - log_p).mul_(q)
    value = terms.sum(-1)
    return value, terms.sub_(q.mul_(value.unsqueeze(-1)))


def generalized_jsd(log_p: Tensor, log_q: Tensor, beta: float = 0.5) -> Tensor:
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q, 0 < beta < 1: beta weights the teacher.

    GKD, arXiv:2306.13649, eq. 1. Tends to 0 and not to a KL at the ends (METHODS D2)."""
    log_m = _log_mixture(log_p, log_q, beta)
    return beta * forward_kl(log_p, log_m) + (1 - beta) * forward_kl(log_q, log_m)


def generalized_jsd_gradient(log_p: Tensor, log_q: Tensor, beta: float = 0.5) -> ValueAndGradient:
    """d JSD / dz = (1 - beta) q (log q - log m - KL(q || m))."""
    log_m = _log_mixture(log_p, log_q, beta)
    of_student, gradient = reverse_kl_gradient(log_m, log_q)
    of_teacher = torch.sub(log_p, log_m, out=log_m).mul_(log_p.exp()).sum(-1)
    return beta * of_teacher + (1 - beta) * of_student, gradient.mul_(1 - beta)


def entropy(log_p: Tensor) -> Tensor:
    """-sum p log p in nats."""
    return -(log_p.exp() * log_p).sum(-1)


def _log_mixture(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    """log(share p + (1 - share) q) without leaving log space."""
    return torch.logaddexp(log_p + math.log(share), log_q + math.log1p(-share))
