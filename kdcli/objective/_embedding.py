"""What a model has read of a sequence, and one vector of it: the parts of losses of sequence embeddings."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kdcli.api import Batch

Pooling = Literal["mean", "last"]


def read_answer(batch: Batch) -> Tensor:
    """[B, T] bool: the positions that hold a token of an answer, each after the position that predicts it.

    A state there has read the token. The last token of a row that ends with it is at no position of the row.
    """
    before, segment = batch.mask[:, :-1], batch.segment
    follows = before & (segment[:, 1:] == segment[:, :-1]) & batch.attention_mask[:, 1:]
    return torch.nn.functional.pad(follows, (1, 0))


def read_prompt(batch: Batch) -> Tensor:
    """[B, T] bool: the positions up to the one that predicts a sequence's first supervised target. In a causal model
    their states have seen nothing of the answer."""
    index = torch.arange(batch.mask.numel(), device=batch.mask.device).view_as(batch.mask)
    none = index.new_full((batch.num_sequences,), -1)
    first = none.scatter_reduce(0, batch.segment[batch.mask], index[batch.mask], "amin", include_self=False)
    return read_text(batch) & (index <= first[batch.segment.clamp(min=0)])


def read_text(batch: Batch) -> Tensor:
    """[B, T] bool: all positions of a sequence."""
    return batch.attention_mask & (batch.segment >= 0)


def some(batch: Batch, positions: Tensor) -> Tensor:
    """[E] bool: the sequences that have one of these positions [B, T]."""
    return torch.bincount(batch.segment[positions], minlength=batch.num_sequences) > 0


def pooled(batch: Batch, hidden: Tensor | None, positions: Tensor, pooling: Pooling) -> Tensor:
    """One float32 vector per sequence, [E, D]: the mean of its states at `positions` [B, T], or the last; else 0."""
    assert hidden is not None, "the student's hidden states were not asked for"
    segment = batch.segment[positions]  # [N]
    states = hidden[positions]  # [N, D]
    states = states.float() if states.dtype in (torch.float16, torch.bfloat16) else states
    if pooling == "last":
        index = torch.arange(len(segment), device=segment.device)
        last = index.new_full((batch.num_sequences,), -1).scatter_reduce(0, segment, index, "amax")
        kept = last[last >= 0]
        return states.new_zeros(batch.num_sequences, states.shape[1]).index_copy(0, segment[kept], states[kept])
    total = states.new_zeros(batch.num_sequences, states.shape[1]).index_add(0, segment, states)
    number = torch.bincount(segment, minlength=batch.num_sequences).clamp(min=1)
    return total / number[:, None].to(total.dtype)
