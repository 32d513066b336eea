"""What a mixture of models says of a batch's targets, computed a chunk of them at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kdcli.api import Batch, TeacherSignal, Voice
from kdcli.errors import ConfigError
from kdcli.ops.chunked import chunk_size
from kdcli.ops.head import Head
from kdcli.ops.mixture import Pool, mixed


def voices_of(signal: TeacherSignal, pool: Pool) -> tuple[Voice, ...]:
    """What a teacher of logits says, as voices whose weights sum to 1. Raises ConfigError for a mixture of the other
    pool: a mean of means is one mixture where both are of the same kind."""
    if signal.voices is not None:
        if signal.pool != pool:
            raise ConfigError(f"teacher.pool: an ensemble inside averages {signal.pool}; set the same pool for both")
        return signal.voices
    hidden, head = signal.hidden, signal.head
    assert hidden is not None and isinstance(head, Head), "a teacher of logits gives hidden states and a head"
    return (Voice(weight=hidden.new_ones(hidden.shape[:2], dtype=torch.float64), hidden=hidden, head=head),)


def target_logprobs(voices: Sequence[Voice], pool: Pool, batch: Batch) -> Tensor:
    """log p(target), [N] of the supervised targets."""
    targets = batch.targets[batch.mask].unsqueeze(-1)

    def of(logits: Tensor, window: slice) -> Tensor:
        return logits.gather(-1, targets[window]).squeeze(-1) - logits.logsumexp(-1)

    return _chunks(voices, pool, batch, of)


def entropies(voices: Sequence[Voice], pool: Pool, batch: Batch) -> Tensor:
    """The entropy of p in nats, [N] of the supervised targets."""

    def of(logits: Tensor, window: slice) -> Tensor:
        del window
        log_p = torch.log_softmax(logits, -1)
        return -(log_p.exp() * log_p).nan_to_num_(0.0).sum(-1)  # 0 log 0 is 0

    return _chunks(voices, pool, batch, of)


def _chunks(voices: Sequence[Voice], pool: Pool, batch: Batch, of: Callable[[Tensor, slice], Tensor]) -> Tensor:
    """`of` the mixture's logits [C, V] and the slice of the targets, for a chunk at a time, joined to [N]."""
    shared = min(voice.head.vocab_size for voice in voices)
    members = [(v.weight[batch.mask], v.hidden[batch.mask], v.head.cut(shared)) for v in voices]
    total, size = len(members[0][0]), chunk_size(shared, batch.mask.device)
    found = [torch.zeros(0, device=batch.mask.device)]
    with torch.autocast(batch.mask.device.type, enabled=False):
        for start in range(0, total, size):
            window = slice(start, start + size)
            logits = mixed([(weight[window], hidden[window], head) for weight, hidden, head in members], pool)
            found.append(of(logits, window))
    return torch.cat(found)
