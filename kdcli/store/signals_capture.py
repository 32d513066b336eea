"""From what a teacher says of a batch to what a store keeps of it, sequence by sequence."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kdcli.api import Batch, Need, Teacher, TeacherSignal
from kdcli.errors import ConfigError
from kdcli.ops.chunked import chunk_size, rows_at_once
from kdcli.ops.draws import keys_of, mixed
from kdcli.ops.mixture import mixed as mixture
from kdcli.store.models import real_ids
from kdcli.store.signals_codec import Codec, Observed, SampledCodec
from kdcli.store.signals_keys import Sequence, sequences_of, wanted_of

BUFFERS = 3  # [C, V] that observing a chunk takes


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One sequence's signal."""

    sequence: Sequence
    block: bytes
    alone: bool  # the teacher saw the student's ids


def vocabulary_of(teacher: Teacher) -> int:
    """The ids that a teacher gives a probability to, known before its weights are loaded."""
    shape = teacher.shape()
    return real_ids(teacher.load_tokenizer()) if shape is None else shape.vocab_size


@torch.no_grad()
def capture(teacher: Teacher, batch: Batch, codec: Codec) -> list[Entry]:
    """Ask the teacher, and code what it says of the supervised targets. Raises ConfigError for one that gives neither
    hidden states nor top-k log-probabilities."""
    sparse = Need.LOGITS not in teacher.provides  # of logits the targets' log-probabilities follow
    signal = teacher.annotate(batch, Need.DISTRIBUTION | (Need.LOGPROBS & teacher.provides if sparse else Need.NOTHING))
    wanted = wanted_of(batch)
    parts = list(_observed(signal, batch, wanted, codec))
    whole = tuple(np.concatenate(column) for column in zip(*parts, strict=True)) if parts else ()
    entries, place = [], 0
    for sequence in sequences_of(batch):
        count = int(sequence.wanted.sum())
        if count:
            own = tuple(column[place : place + count] for column in whole)
            entries.append(Entry(sequence=sequence, block=codec.block(own), alone=batch.teacher is None))
        place += count
    return entries


def _observed(signal: TeacherSignal, batch: Batch, wanted: Tensor, codec: Codec) -> Iterator[Observed]:
    """Chunk by chunk, in the order of the targets."""
    targets = batch.targets[wanted]
    if signal.topk is not None:
        if signal.logprobs is None:
            raise ConfigError("cache: this teacher gives no log-probabilities of the targets; set teacher=hf")
        topk = signal.topk
        kept = type(topk)(
            ids=topk.ids[wanted],
            logprobs=topk.logprobs[wanted],
            temperature=topk.temperature,
            sampled=topk.sampled,
        )
        yield codec.observe_topk(kept, signal.logprobs[wanted])
        return
    keys = _keys(batch, wanted, codec) if isinstance(codec, SampledCodec) else targets
    for part, logits in chunks_of(signal, wanted, codec.vocab_size):
        own_targets, own_keys, rows = targets[part], keys[part], rows_at_once(logits)
        for start in range(0, len(logits), rows):
            some = slice(start, start + rows)
            yield codec.observe(logits[some], own_targets[some], own_keys[some])


def chunks_of(signal: TeacherSignal, wanted: Tensor, vocab_size: int) -> Iterator[tuple[slice, Tensor]]:
    """The teacher's logits [C, V] of the `wanted` targets, some at a time. Raises ConfigError where it gives none."""
    members = [] if signal.voices is None else [(v.weight[wanted], v.hidden[wanted], v.head) for v in signal.voices]
    if signal.head is not None and signal.hidden is not None:
        members = [(wanted[wanted].float(), signal.hidden[wanted], signal.head)]
    if not members:
        raise ConfigError("cache: this teacher gives no distribution over tokens; set teacher=hf")
    size = chunk_size(vocab_size, wanted.device, BUFFERS)
    for start in range(0, int(wanted.sum()), size):
        part = slice(start, start + size)
        cut = [(weight[part], hidden[part], head.cut(vocab_size)) for weight, hidden, head in members]
        yield part, cut[0][2](cut[0][1]) if signal.voices is None else mixture(cut, signal.pool)


def _keys(batch: Batch, wanted: Tensor, codec: SampledCodec) -> Tensor:
    """What each target's draws depend on, as in objective=sampled."""
    sequence = keys_of(batch.row or [""] * batch.num_sequences, codec.seed, batch.input_ids.device)
    return mixed(sequence[batch.segment[wanted]], batch.input_ids[wanted], batch.targets[wanted])
