"""Divergences of log-probabilities: p is the teacher, q the student, natural logarithm, no reduction, no T squared.

Every function maps log_p, log_q [..., S] (each sums to one over S, which is the vocabulary or a common support of
K + 1 symbols) to values [...]. Ids of probability zero (-inf) must be cut away before.

`*_gradient` are closed forms: the value and its gradient with respect to the student's logits
z, where log_q = log_softmax(z): q * (g - <q, g>) with g = d value / d q.
"""

from __future__ import annotations

import math
from typing import NamedTuple

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


def symmetric_kl(log_p: Tensor, log_q: Tensor, forward_weight: float = 0.5) -> Tensor:
    """w KL(p || q) + (1 - w) KL(q || p), w = `forward_weight`."""
    return forward_weight * forward_kl(log_p, log_q) + (1 - forward_weight) * reverse_kl(log_p, log_q)


def symmetric_kl_gradient(log_p: Tensor, log_q: Tensor, forward_weight: float = 0.5) -> ValueAndGradient:
    """w (q - p) + (1 - w) q (log q - log p - KL(q || p))."""
    return _mixed_kls(log_p, log_q, forward_weight)


def adaptive_kl(log_p: Tensor, log_q: Tensor, mu: float = 0.5) -> Tensor:
    """w KL(p || q) + (1 - w) KL(q || p), w = the head's share of |p - q|, held fixed (no gradient through it).

    AKL, arXiv:2404.02657: the head is the likeliest ids of p while their sum is at most `mu`, and always the first.
    At p = q, where the share is 0 / 0, w = 1/2.
    """
    weight = _head_share(log_p.detach(), log_q.detach(), mu)
    return weight * forward_kl(log_p, log_q) + (1 - weight) * reverse_kl(log_p, log_q)


def adaptive_kl_gradient(log_p: Tensor, log_q: Tensor, mu: float = 0.5) -> ValueAndGradient:
    """w (q - p) + (1 - w) q (log q - log p - KL(q || p)) with w held fixed."""
    return _mixed_kls(log_p, log_q, _head_share(log_p, log_q, mu).unsqueeze(-1))


def generalized_jsd(log_p: Tensor, log_q: Tensor, beta: float = 0.5) -> Tensor:
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q, 0 < beta < 1: beta weights the teacher.

    GKD, arXiv:2306.13649, eq. 1. Tends to 0 and not to a KL at the ends."""
    log_m = _log_mixture(log_p, log_q, beta)
    return beta * forward_kl(log_p, log_m) + (1 - beta) * forward_kl(log_q, log_m)


def generalized_jsd_gradient(log_p: Tensor, log_q: Tensor, beta: float = 0.5) -> ValueAndGradient:
    """d JSD / dz = (1 - beta) q (log q - log m - KL(q || m))."""
    log_m = _log_mixture(log_p, log_q, beta)
    of_student, gradient = reverse_kl_gradient(log_m, log_q)
    of_teacher = torch.sub(log_p, log_m, out=log_m).mul_(log_p.exp()).sum(-1)
    return beta * of_teacher + (1 - beta) * of_student, gradient.mul_(1 - beta)


def skew_kl(log_p: Tensor, log_q: Tensor, alpha: float = 0.1) -> Tensor:
    """KL(p || m) with m = alpha p + (1 - alpha) q, 0 <= alpha < 1: alpha is the teacher's share of the mixture.

    DistiLLM, arXiv:2402.03898. KL(p || q) at alpha = 0."""
    return forward_kl(log_p, _log_mixture(log_p, log_q, alpha))


def skew_kl_gradient(log_p: Tensor, log_q: Tensor, alpha: float = 0.1) -> ValueAndGradient:
    """(1 - alpha) (q <p, q / m> - p q / m)."""
    log_m = _log_mixture(log_p, log_q, alpha)
    value = torch.linalg.vecdot(log_p.exp(), log_p - log_m)
    falling = (log_p + log_q).sub_(log_m).exp_().mul_(1 - alpha)  # -q g, [..., S]
    total = falling.sum(-1, keepdim=True)
    return value, log_q.exp().mul_(total).sub_(falling)


def skew_reverse_kl(log_p: Tensor, log_q: Tensor, alpha: float = 0.1, detach_mixture: bool = False) -> Tensor:
    """KL(q || m) with m = (1 - alpha) p + alpha q, 0 <= alpha < 1: alpha is the student's share of the mixture.

    DistiLLM, arXiv:2402.03898; KL(q || p) at alpha = 0. `detach_mixture` holds m fixed (DistiLLM-2)."""
    log_m = _log_mixture(log_q, log_p, alpha)
    return forward_kl(log_q, log_m.detach() if detach_mixture else log_m)


def skew_reverse_kl_gradient(
    log_p: Tensor, log_q: Tensor, alpha: float = 0.1, detach_mixture: bool = False
) -> ValueAndGradient:
    """q (g - <q, g>) with g = log q - log m - alpha q / m; the last part is what `detach_mixture` drops."""
    log_m = _log_mixture(log_q, log_p, alpha)
    q = log_q.exp()
    slope = log_q - log_m
    value = torch.linalg.vecdot(q, slope)
    if alpha and not detach_mixture:
        slope -= (slope + math.log(alpha)).exp_()
    return value, slope.sub_(torch.linalg.vecdot(q, slope).unsqueeze(-1)).mul_(q)


def total_variation(log_p: Tensor, log_q: Tensor) -> Tensor:
    """1/2 sum |p - q|, in [0, 1]; its slope at p_v = q_v is 0."""
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)


def total_variation_gradient(log_p: Tensor, log_q: Tensor) -> ValueAndGradient:
    """1/2 q (sign(q - p) - <q, sign(q - p)>)."""
    q = log_q.exp()
    difference = q - log_p.exp()
    value = 0.5 * difference.abs().sum(-1)
    sign = difference.sign_()
    return value, sign.sub_(torch.linalg.vecdot(q, sign).unsqueeze(-1)).mul_(q).mul_(0.5)


def alpha_beta(log_p: Tensor, log_q: Tensor, alpha: float, beta: float) -> Tensor:
    """-1 / (alpha beta) sum [p^a q^b - a / (a + b) p^(a + b) - b / (a + b) q^(a + b)], with its limits at 0.

    ABKD, arXiv:2505.04560, after Cichocki et al. 2011. (1, 0) is KL(p || q), (0, 1) is KL(q || p), and (0, 0) is
    1/2 sum (log p - log q)^2. Near a limit, every term is e^((a + b) max(log p, log q)) times a second difference of
    f_x(d) = (e^(x d) - 1) / x at d = -|log p - log q|, which does not cancel and does not overflow for a, b >= 0.
    """
    if _far_from_limits(alpha, beta):
        return _alpha_beta_parts(log_p, log_q, alpha, beta)[0]
    gap = -(log_p - log_q).abs()
    below = _slope_difference(gap, alpha, beta)  # where p <= q
    above = _slope_difference(gap, beta, alpha)
    lead = ((alpha + beta) * torch.maximum(log_p, log_q)).exp()
    return (lead * torch.where(log_p <= log_q, below, above)).sum(-1)


def alpha_beta_gradient(log_p: Tensor, log_q: Tensor, alpha: float, beta: float) -> ValueAndGradient:
    """q g - q <1, q g> with q g = -(p^a q^b - q^(a + b)) / a, and q^b (log q - log p) at a = 0."""
    if _far_from_limits(alpha, beta):
        value, cross, own = _alpha_beta_parts(log_p, log_q, alpha, beta)
        slope = own.sub_(cross).div_(alpha)  # q g, [..., S]
        total = slope.sum(-1, keepdim=True)
        return value, slope.sub_(log_q.exp().mul_(total))
    ratio = log_p - log_q
    lead = torch.where(ratio <= 0, (alpha + beta) * log_q, alpha * log_p + beta * log_q).exp_()
    slope = lead.mul_(_exp_slope(-ratio.abs(), alpha)).mul_(ratio.sign_())
    total = slope.sum(-1, keepdim=True)
    return alpha_beta(log_p, log_q, alpha, beta), slope.sub_(log_q.exp().mul_(total))


def interpolated_kl(log_p: Tensor, log_q: Tensor, t: float) -> Tensor:
    """KL(p_t || q) with p_t = softmax(t log p + (1 - t) log q), its log q held fixed (no gradient through p_t).

    TAID, arXiv:2501.16937. KL(p || q) at t = 1, and 0 at t = 0.
    """
    return forward_kl(_between(log_p, log_q.detach(), t), log_q)


def interpolated_kl_gradient(log_p: Tensor, log_q: Tensor, t: float) -> ValueAndGradient:
    """q - p_t."""
    return forward_kl_gradient(_between(log_p, log_q, t), log_q)


def logit_mse(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Mean squared difference of logits, each centred over the vocabulary: the variance of log p - log q over S."""
    return (log_p - log_q).var(-1, correction=0)


def logit_mse_gradient(log_p: Tensor, log_q: Tensor) -> ValueAndGradient:
    """2 / S of the centred difference."""
    difference = log_q - log_p
    difference -= difference.mean(-1, keepdim=True)
    return difference.square().mean(-1), difference.mul_(2 / difference.shape[-1])


def decoupled_kl(
    log_p: Tensor, log_q: Tensor, targets: Tensor, target_weight: float = 1.0, other_weight: float = 8.0
) -> Tensor:
    """a KL of (target, not target) + b KL among the other ids; targets [...] are indices into S.

    DKD, arXiv:2203.08679, eq. 7. KL(p || q) is the sum with a = 1 and b = 1 - p_target.
    """
    return _decoupled_value(_decoupled(log_p, targets), _decoupled(log_q, targets), target_weight, other_weight)


def decoupled_kl_gradient(
    log_p: Tensor, log_q: Tensor, targets: Tensor, target_weight: float = 1.0, other_weight: float = 8.0
) -> ValueAndGradient:
    """a (q_t - p_t) at the target, and b (q' - p') - a (q_t - p_t) q' elsewhere, ' renormalised without the target."""
    one, other = _decoupled(log_p, targets), _decoupled(log_q, targets)
    value = _decoupled_value(one, other, target_weight, other_weight)
    # of q_t - p_t and (1 - p_t) - (1 - q_t), whichever has the smaller numbers cancels less
    p, q = one.binary.exp(), other.binary.exp()
    moved = torch.where(p[..., 0] < 0.5, q[..., 0] - p[..., 0], p[..., 1] - q[..., 1]).unsqueeze(-1).mul_(target_weight)
    gradient = other.others.exp().mul_(other_weight - moved).sub_(one.others.exp(), alpha=other_weight)
    return value, gradient.scatter_(-1, targets.unsqueeze(-1), moved)


def entropy(log_p: Tensor) -> Tensor:
    """-sum p log p in nats."""
    return -(log_p.exp() * log_p).sum(-1)


def _between(log_p: Tensor, log_q: Tensor, t: float) -> Tensor:
    """log softmax of t log p + (1 - t) log q."""
    return torch.log_softmax(torch.lerp(log_q, log_p, t), dim=-1)


def _log_mixture(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    """log(share p + (1 - share) q) without leaving log space, 0 <= share < 1."""
    if share == 0:
        return log_q
    return torch.logaddexp(log_p + math.log(share), log_q + math.log1p(-share))


def _mixed_kls(log_p: Tensor, log_q: Tensor, forward_weight: Tensor | float) -> ValueAndGradient:
    """w KL(p || q) + (1 - w) KL(q || p) and its gradient; w is a number or [..., 1]."""
    forward, gradient = forward_kl_gradient(log_p, log_q)
    reverse, reverse_gradient = reverse_kl_gradient(log_p, log_q)
    gradient.mul_(forward_weight).add_(reverse_gradient.mul_(1 - forward_weight))
    weight = forward_weight.squeeze(-1) if isinstance(forward_weight, Tensor) else forward_weight
    return weight * forward + (1 - weight) * reverse, gradient


def _head_share(log_p: Tensor, log_q: Tensor, mu: float) -> Tensor:
    """Share of sum |p - q| that lies on the head of p, [...]; 1/2 where p = q."""
    p = log_p.exp()
    gap = (p - log_q.exp()).abs_()
    size = 128  # sorting the whole vocabulary costs several head matmuls, and heads are short
    while True:
        top, order = p.topk(min(size, p.shape[-1]), dim=-1)
        reached = top.cumsum(-1)
        if size >= p.shape[-1] or bool((reached[..., -1] > mu).all()):
            break
        size *= 8
    head = reached <= mu
    head[..., 0] = True
    total = gap.sum(-1)
    return torch.where(total > 0, (gap.gather(-1, order) * head).sum(-1) / total, 0.5)


def _far_from_limits(alpha: float, beta: float) -> bool:
    """Whether the formula as it stands loses no more than one digit to its divisions."""
    return min(abs(alpha), abs(beta), abs(alpha + beta)) >= 0.1


def _alpha_beta_parts(log_p: Tensor, log_q: Tensor, alpha: float, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """The formula as it stands: value [...], p^a q^b and q^(a + b), both [..., S]."""
    both = alpha + beta
    cross, own = (alpha * log_p + beta * log_q).exp(), (both * log_q).exp()
    teacher = (both * log_p).exp().sum(-1)
    value = (alpha / both * teacher + beta / both * own.sum(-1) - cross.sum(-1)) / (alpha * beta)
    return value, cross, own


def _exp_slope(d: Tensor, x: float) -> Tensor:
    """(e^(x d) - 1) / x, which is d at x = 0."""
    return d if x == 0 else torch.expm1(x * d) / x


def _slope_difference(d: Tensor, a: float, b: float) -> Tensor:
    """(f_(a + b)(d) - f_a(d)) / b with f = _exp_slope; at b = 0 the derivative of f_a(d) by a."""
    steepest = max(abs(a), abs(a + b))
    if steepest == 0 or (abs(b) < 1e-4 and a == -b / 2):
        return 0.5 * d.square()
    if abs(b) < 1e-4:  # float32 would lose the difference; the derivative half-way errs by its square
        x = a + b / 2
        far = ((x * d - 1) * (x * d).exp() + 1) / x**2
    else:
        far = (_exp_slope(d, a + b) - _exp_slope(d, a)) / b
    near = d.clamp(min=-0.25 / steepest)  # where far is a difference of equals: sum of c_k d^k / k!, k from 2
    series = torch.zeros_like(d)
    for k in range(9, 1, -1):
        coefficient = sum((a + b) ** i * a ** (k - 2 - i) for i in range(k - 1)) / math.factorial(k)
        series = series * near + coefficient
    return torch.where(near == d, series * near.square(), far)


class _Decoupled(NamedTuple):
    binary: Tensor  # [..., 2] log-probabilities of the target, and of all else
    others: Tensor  # [..., S] log-probabilities given that it is not the target, -inf at the target
    is_target: Tensor  # [..., S] bool


def _decoupled_value(one: _Decoupled, other: _Decoupled, target_weight: float, other_weight: float) -> Tensor:
    ratio = (one.others - other.others).masked_fill(one.is_target, 0.0)  # -inf - -inf at the target itself
    among_others = (one.others.exp() * ratio).sum(-1)
    return target_weight * forward_kl(one.binary, other.binary) + other_weight * among_others


def _decoupled(logprobs: Tensor, targets: Tensor) -> _Decoupled:
    index = targets.unsqueeze(-1)
    is_target = torch.zeros_like(logprobs, dtype=torch.bool).scatter_(-1, index, True)
    others = logprobs.masked_fill(is_target, -math.inf)
    rest = others.logsumexp(-1, keepdim=True)  # and not log(1 - p_target), which is lost where p_target rounds to 1
    return _Decoupled(torch.cat([logprobs.gather(-1, index), rest], -1), others - rest, is_target)
