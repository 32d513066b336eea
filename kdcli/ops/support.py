"""A common support for teacher and student: the vocabulary, or K cached ids and "the rest".

S = V for a dense teacher; for a sparse one S = K + 1, or K where the rest is left out or there is none.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Missing = Literal["tail", "renormalize", "teacher_only"]


def on_support(
    log_q: Tensor,
    *,
    log_p: Tensor | None = None,
    ids: Tensor | None = None,
    logprobs: Tensor | None = None,
    missing: Missing = "tail",
) -> tuple[Tensor, Tensor]:
    """(log_p, log_q) [..., S], both summing to one, so that a divergence is one line for any teacher.

    `log_q` [..., V] is the student's. A dense teacher gives `log_p` [..., V]; a sparse one gives `ids` and `logprobs`
    [..., K] at the same temperature.
    """
    if log_p is not None:
        assert log_p.shape == log_q.shape, f"cut both to the shared ids: {log_p.shape} {log_q.shape}"
        return log_p, log_q
    assert ids is not None and logprobs is not None, "a teacher is dense (log_p) or sparse (ids, logprobs)"
    return sparse(ids, logprobs, log_q, missing)


def sparse(ids: Tensor, logprobs: Tensor, log_q: Tensor, missing: Missing = "tail") -> tuple[Tensor, Tensor]:
    """Distinct ids and teacher log-probabilities [..., K], student log-probabilities [..., V] -> (log_p, log_q).

    `tail` adds one symbol for all other ids, so both sides sum to one over K + 1 and every f-divergence is a lower
    bound of the dense one; `renormalize` makes both distributions over the K ids; `teacher_only` renormalizes the
    teacher and keeps the student's mass as it is over K + 1 symbols, the last of teacher probability (almost) zero.
    """
    log_p = teacher_side(logprobs, log_q, missing)
    kept = log_q.gather(-1, ids)
    if log_p.shape[-1] == ids.shape[-1]:
        return log_p, torch.log_softmax(kept, dim=-1)
    # summed, and not 1 minus the rest: it stays right where the student puts next to nothing there
    rest = log_q.scatter(-1, ids, -math.inf).logsumexp(-1, keepdim=True)
    return log_p, torch.cat([kept, rest], dim=-1)


def teacher_side(logprobs: Tensor, like: Tensor, missing: Missing = "tail") -> Tensor:
    """Teacher log-probabilities [..., K] -> [..., S] in the type of the student's `like` [..., V], summing to one."""
    logprobs = logprobs.to(like.dtype)
    if missing == "renormalize" or logprobs.shape[-1] == like.shape[-1]:
        return torch.log_softmax(logprobs, dim=-1)
    if missing == "teacher_only":
        return torch.cat([torch.log_softmax(logprobs, -1), torch.full_like(logprobs[..., :1], _TINY_LOG)], dim=-1)
    total, rest = _rest(logprobs)
    return torch.cat([logprobs - total, rest], dim=-1)


def student_side(
    logits: Tensor, ids: Tensor, temperature: float = 1.0, missing: Missing = "tail"
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The student's log_q [..., S] from its logits [..., V], and what takes a gradient back to the vocabulary.

    With G = d value / d x, [..., S], where log_q = log_softmax(x), that function gives d value / d (logits / T)
    [..., V]: G_k at the K ids, and of the rest's G each other id its share q_i / q_rest. Holds one buffer [..., V],
    which becomes the gradient: call it once. Without a graph.
    """
    kept = logits.gather(-1, ids) / temperature
    if missing == "renormalize" or ids.shape[-1] == logits.shape[-1]:
        return torch.log_softmax(kept, -1), lambda gradient: torch.zeros_like(logits).scatter_(-1, ids, gradient)
    shares = logits.scatter(-1, ids, -math.inf)
    if temperature != 1.0:
        shares /= temperature
    top = shares.amax(-1, keepdim=True)
    mass = shares.sub_(top).exp_().sum(-1, keepdim=True)

    def back(gradient: Tensor) -> Tensor:
        return shares.mul_(gradient[..., -1:] / mass).scatter_(-1, ids, gradient[..., :-1])

    return torch.log_softmax(torch.cat([kept, top + mass.log()], dim=-1), dim=-1), back


def log_rest(logprobs: Tensor) -> Tensor:
    """log(1 - sum exp(logprobs)), [..., K] -> [..., 1]; the sum is held below 1 by float32's resolution."""
    return _rest(logprobs)[1]


def _rest(logprobs: Tensor) -> tuple[Tensor, Tensor]:
    """What to take off the log-probabilities, [..., 1], 0 unless they sum to 1 or (rounded when stored) more; and
    the log of what is missing to 1, [..., 1]."""
    total = torch.logsumexp(logprobs, dim=-1, keepdim=True)
    held = total.clamp(max=-_RESOLUTION)
    return total - held, torch.log(-torch.expm1(held))


_RESOLUTION = 2.0**-23  # log-probabilities come in float32 at best, so the mass they lack is not known better
_TINY_LOG = -100.0  # exp(-100) is below float32's smallest step next to 1; finite, so 0 * log 0 stays 0
