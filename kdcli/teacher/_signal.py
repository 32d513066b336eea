"""What a model's layers computed, as the signal for a batch's targets."""

from __future__ import annotations

import torch
from torch import Tensor

from kdcli.api import Batch, Need, TeacherSignal, TeacherView
from kdcli.errors import ConfigError
from kdcli.ops.chunked import chunk_size, target_logprobs
from kdcli.ops.head import Head
from kdcli.store.layers import Layers


def refuse_places(batch: Batch, needs: Need) -> None:
    """Raise ConfigError for attention or relations where the teacher has its own view of the batch: they compare every
    position with every other, so both models must see the same ids."""
    if batch.teacher is not None and needs & (Need.ATTENTION | Need.RELATIONS):
        raise ConfigError(
            "teacher: it reads another prompt or has another tokenizer, but attention and relations are compared "
            "position by position; leave teacher_prompt out of the data, or drop the objectives that need them"
        )


def signal_of(layers: Layers, head: Head, embedding: Tensor | None, batch: Batch, needs: Need) -> TeacherSignal:
    """At the student's positions; `layers` are of one pass over `batch.teacher`, or else over `batch`.

    `embedding` [V', D] of the input ids. For LOGPROBS the head's weight must be whole.
    """
    view = batch.teacher
    hidden, states = at_targets(layers.hidden, view), layers.hidden_states
    signal = TeacherSignal(
        hidden=hidden,
        head=head,
        hidden_states=None if states is None else tuple(at_targets(layer, view) for layer in states),
        attentions=layers.attentions,
        relations=layers.relations,
        embedding=embedding if Need.HIDDEN in needs else None,
    )
    if view is not None and view.targets is not None:
        assert view.mask is not None, "a view of another tokenizer says which targets are of the answer"
        signal.own_hidden = layers.hidden
        if Need.LOGPROBS in needs:
            signal.own_logprobs = logprobs(layers.hidden, head, view.targets, view.mask)
    elif Need.LOGPROBS in needs:
        seen = batch.mask if view is None else batch.mask & (view.position >= 0)
        signal.logprobs = logprobs(hidden, head, batch.targets, seen)
    return signal


def at_targets(hidden: Tensor, view: TeacherView | None) -> Tensor:
    """Hidden states [B, T', D] of the teacher's positions -> [B, T, D] of the student's; 0 where it has none."""
    if view is None:
        return hidden
    index = view.position.clamp(min=0).unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
    return hidden.gather(1, index).masked_fill((view.position < 0).unsqueeze(-1), 0.0)


def logprobs(hidden: Tensor, head: Head, targets: Tensor, mask: Tensor) -> Tensor:
    """log p(target), [B, T] in float32, 0 where `mask` is False; the head sees a chunk at a time."""
    values = target_logprobs(hidden[mask], head, targets[mask], chunk_size(head.vocab_size, hidden.device))
    return torch.zeros(mask.shape, device=hidden.device).masked_scatter(mask, values)
