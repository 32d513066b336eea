"""A common support for teacher and student: the vocabulary, or K cached ids and "the rest" (METHODS D11)."""

from __future__ import annotations

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

    `log_q` [..., V] is the student's. A dense teacher gives `log_p` [..., V] (S = V); a sparse one gives `ids` and
    `logprobs` [..., K] at the same temperature (S = K + 1, or K with `missing="renormalize"`).
    """
    if log_p is not None:
        assert log_p.shape == log_q.shape, f"cut both to the shared ids: {log_p.shape} {log_q.shape}"
        return log_p, log_q
    assert ids is not None and logprobs is not None, "a teacher is dense (log_p) or sparse (ids, logprobs)"
    return sparse(ids, logprobs, log_q, missing)


def sparse(ids: Tensor, logprobs: Tensor, log_q: Tensor, missing: Missing = "tail") -> tuple[Tensor, Tensor]:
    """Top-k ids and teacher log-probabilities [..., K], student log-probabilities [..., V] -> (log_p, log_q).

    `tail` adds one symbol for all other ids, so both sides sum to one over K + 1 and every divergence is a lower
    bound of the dense one; `renormalize` makes both distributions over the K ids; `teacher_only` renormalizes the
    teacher and keeps the student's mass as it is over K + 1 symbols, the last of teacher probability (almost) zero.
    """
    log_q_k = log_q.gather(-1, ids)
    if missing == "renormalize":
        return torch.log_softmax(logprobs, dim=-1), torch.log_softmax(log_q_k, dim=-1)
    log_q_rest = log_rest(log_q_k)
    if missing == "teacher_only":
        log_p_k = torch.log_softmax(logprobs, dim=-1)
        log_p_rest = torch.full_like(log_q_rest, _TINY_LOG)
    else:
        log_p_k, log_p_rest = logprobs, log_rest(logprobs)
    return torch.cat([log_p_k, log_p_rest], dim=-1), torch.cat([log_q_k, log_q_rest], dim=-1)


def log_rest(logprobs: Tensor) -> Tensor:
    """log(1 - sum exp(logprobs)), [..., K] -> [..., 1]; the sum is held below 1 by float32's resolution."""
    total = torch.logsumexp(logprobs, dim=-1, keepdim=True).clamp(max=-1e-7)
    return torch.log(-torch.expm1(total))


_TINY_LOG = -100.0  # exp(-100) is below float32's smallest step next to 1; finite, so 0 * log 0 stays 0
