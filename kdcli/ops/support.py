"""A common support for teacher and student: the vocabulary, or K cached ids and "the rest".

S = V for a dense teacher; for a sparse one S = K + 1, or K where the rest is left out or there is none.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar, Literal, Protocol, TypeVar

import torch
from torch import Tensor

Missing = Literal["tail", "renormalize", "teacher_only"]


class _Entries(Protocol):
    """`kdcli.api.TopK`, which this layer does not know."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    ids: Tensor
    logprobs: Tensor


TopKLike = TypeVar("TopKLike", bound=_Entries)


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
    """Ids and teacher log-probabilities [..., K], student log-probabilities [..., V] -> (log_p, log_q).

    `tail` adds one symbol for all other ids, so both sides sum to one over K + 1 and every f-divergence is a lower
    bound of the dense one; `renormalize` makes both distributions over the K ids; `teacher_only` renormalizes the
    teacher and keeps the student's mass as it is over K + 1 symbols, the last of teacher probability (almost) zero.
    An entry of log-probability -inf stands for none, whatever its id: both sides say e^-100 of it.
    """
    log_p = teacher_side(logprobs, log_q, missing)
    none = logprobs == -math.inf
    at = _real_ids(ids, logprobs, log_q.shape[-1])
    kept = log_q.gather(-1, at).masked_fill(none, _lowest(log_q))
    if log_p.shape[-1] == ids.shape[-1]:
        return log_p, _negligible(torch.log_softmax(kept, dim=-1), none)
    # summed, and not 1 minus the rest: it stays right where the student puts next to nothing there
    taken = torch.zeros_like(log_q, dtype=torch.bool).scatter_(-1, at, ~none.all(-1, keepdim=True).expand_as(at))
    rest = log_q.masked_fill(taken, _lowest(log_q)).logsumexp(-1, keepdim=True)
    whole = _is_whole(none, log_q)
    return log_p, _negligible(torch.cat([kept, rest], dim=-1), torch.cat([none, whole], dim=-1))


def teacher_side(logprobs: Tensor, like: Tensor, missing: Missing = "tail") -> Tensor:
    """Teacher log-probabilities [..., K] -> [..., S] in the type of the student's `like` [..., V], summing to one."""
    none = logprobs == -math.inf
    logprobs = logprobs.to(like.dtype)
    if not _has_rest(none, like, missing):
        return _negligible(torch.log_softmax(logprobs.masked_fill(none, _lowest(logprobs)), dim=-1), none)
    if missing == "teacher_only":
        kept, rest = torch.log_softmax(logprobs.masked_fill(none, _lowest(logprobs)), -1), logprobs[..., :1]
        unlikely = torch.ones_like(none[..., :1])
    else:
        held = logprobs.masked_fill(none, _TINY_LOG)
        total, rest = _rest(held)
        kept, unlikely = held - total, _is_whole(none, like)
    return _negligible(torch.cat([kept, rest], dim=-1), torch.cat([none, unlikely], dim=-1))


def student_side(
    logits: Tensor,
    ids: Tensor,
    temperature: float = 1.0,
    missing: Missing = "tail",
    *,
    logprobs: Tensor | None = None,
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The student's log_q [..., S] from its logits [..., V], and what takes a gradient back to the vocabulary.

    With G = d value / d x, [..., S], where log_q = log_softmax(x), that function gives d value / d (logits / T)
    [..., V]: G_k at the K ids, and of the rest's G each other id its share q_i / q_rest. Holds one buffer [..., V],
    which becomes the gradient: call it once. Without a graph. `logprobs` [..., K], the teacher's, say which entries
    stand for none; without them, none does.
    """
    none = torch.zeros_like(ids, dtype=torch.bool) if logprobs is None else logprobs == -math.inf
    at = ids if logprobs is None else _real_ids(ids, logprobs, logits.shape[-1])
    given = logits.gather(-1, at)
    kept = (given / temperature).masked_fill(none, _lowest(logits))

    def own(gradient: Tensor) -> Tensor:
        return gradient.masked_fill(none, 0.0)

    if not _has_rest(none, logits, missing):
        log_q = _negligible(torch.log_softmax(kept, -1), none)
        return log_q, lambda gradient: torch.zeros_like(logits).scatter_add_(-1, at, own(gradient))
    whole = _is_whole(none, logits)
    # a row of entries that all stand for none keeps its logits, so that "the rest" is all of the vocabulary
    shares = logits.scatter(-1, at, torch.where(none.all(-1, keepdim=True), given, _lowest(logits)))
    if temperature != 1.0:
        shares /= temperature
    top = shares.amax(-1, keepdim=True)
    mass = shares.sub_(top).exp_().sum(-1, keepdim=True)

    def back(gradient: Tensor) -> Tensor:
        rest = gradient[..., -1:].masked_fill(whole, 0.0)
        return shares.mul_(rest / mass).scatter_add_(-1, at, own(gradient[..., :-1]))

    both = torch.cat([kept, (top + mass.log()).masked_fill(whole, _lowest(logits))], dim=-1)
    return _negligible(torch.log_softmax(both, dim=-1), torch.cat([none, whole], dim=-1)), back


def cut_topk(topk: TopKLike, vocab_size: int | None) -> TopKLike:
    """What a teacher that knows more ids than the student says of the first `vocab_size`, as cutting its logits would:
    the other ids stand for none, and the rest is divided by 1 minus their mass. None: all ids are shared."""
    if vocab_size is None:
        return topk
    beyond = topk.ids >= vocab_size
    dropped = topk.logprobs.masked_fill(~beyond, -math.inf).exp().sum(-1, keepdim=True)
    logprobs = topk.logprobs - torch.log1p(-dropped.clamp(max=1 - _RESOLUTION))
    cut = {"ids": topk.ids.masked_fill(beyond, 0), "logprobs": logprobs.masked_fill(beyond, -math.inf)}
    return replace(topk, **cut)  # pyright: ignore[reportArgumentType]


def log_rest(logprobs: Tensor) -> Tensor:
    """log(1 - sum exp(logprobs)), [..., K] -> [..., 1]; the sum is held below 1 by float32's resolution."""
    return _rest(logprobs)[1]


def _rest(logprobs: Tensor) -> tuple[Tensor, Tensor]:
    """What to take off the log-probabilities, [..., 1], 0 unless they sum to 1 or (rounded when stored) more; and
    the log of what is missing to 1, [..., 1]."""
    total = torch.logsumexp(logprobs, dim=-1, keepdim=True)
    held = total.clamp(max=-_RESOLUTION)
    return total - held, torch.log(-torch.expm1(held))


def _real_ids(ids: Tensor, logprobs: Tensor, vocab_size: int) -> Tensor:
    """The ids [..., K], where an entry stands for none that of the likeliest one instead, all below `vocab_size`."""
    likeliest = ids.gather(-1, logprobs.argmax(-1, keepdim=True))
    return torch.where(logprobs == -math.inf, likeliest, ids).clamp(max=vocab_size - 1)


def _has_rest(none: Tensor, like: Tensor, missing: Missing) -> bool:
    """Whether one symbol more stands for all other ids: not where there are none."""
    if missing == "renormalize":
        return False
    return none.shape[-1] < like.shape[-1] or bool((none.sum(-1) > none.shape[-1] - like.shape[-1]).any())


def _is_whole(none: Tensor, like: Tensor) -> Tensor:
    """[..., 1] bool: where the entries are the whole vocabulary, so that there is no rest."""
    return (~none).sum(-1, keepdim=True) == like.shape[-1]


def _negligible(log: Tensor, where: Tensor) -> Tensor:
    return log.masked_fill(where, _TINY_LOG)


def _lowest(like: Tensor) -> float:
    """A log-probability of zero that stays finite, also in gradients."""
    return torch.finfo(like.dtype).min / 2


_RESOLUTION = 2.0**-23  # log-probabilities come in float32 at best, so the mass they lack is not known better
_TINY_LOG = -100.0  # exp(-100) is below float32's smallest step next to 1; finite, so 0 * log 0 stays 0
