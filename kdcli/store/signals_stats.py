"""What is in a store, and how far it is from what the teacher says."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from kdcli.api import Batch, Need, Teacher
from kdcli.store.signals import Signals, damage
from kdcli.store.signals_capture import chunks_of
from kdcli.store.signals_codec import Decoded
from kdcli.store.signals_keys import as_keys, key_of, key_of_segment, wanted_of_segment
from kdcli.store.tokens import Segment

SAMPLED = 512  # sequences whose rest is looked at
ASKED = 16  # sequences that the teacher is asked about again


@dataclass(frozen=True, kw_only=True)
class Stats:
    """Of a whole store; `dropped` of a sample."""

    sequences: int
    targets: int
    size: int  # bytes, of all shards
    shards: int
    entries: float  # mean number of ids per target
    dropped: tuple[float, float] | None  # mean and largest mass that no id stands for; None of drawn ids
    looked_at: int  # targets of that sample
    damaged: list[str]


@dataclass(frozen=True, kw_only=True)
class Error:
    """KL of the teacher and what is stored, in nats per target."""

    mean: float
    largest: float
    targets: int


def stats_of(store: Signals) -> Stats:
    """Reads every shard once, for its checksum. A damaged shard is told of and left out."""
    damaged = damage(store.path)
    whole = [] if damaged else store.shards
    places = np.unique(np.linspace(0, len(store) - 1, SAMPLED).astype(int)) if whole and len(store) else []
    decoded = [_all_of(store, int(place)) for place in places]
    entries = [np.isfinite(one.logprobs).sum(1) for one in decoded]
    rest = [np.exp(one.rest) for one in decoded if one.rest is not None]
    dropped = np.concatenate(rest) if rest else None
    return Stats(
        sequences=len(store) if whole else 0,
        targets=sum(shard.targets for shard in whole),
        size=sum(shard.file.size for shard in whole),
        shards=len(whole),
        entries=float(np.concatenate(entries).mean()) if entries else 0.0,
        dropped=None if dropped is None else (float(dropped.mean()), float(dropped.max())),
        looked_at=sum(len(one.target) for one in decoded),
        damaged=damaged,
    )


def coverage(store: Signals, segments: Iterable[Segment]) -> tuple[int, int, int, int]:
    """(rows that are stored, rows, targets of the stored rows, targets) of a data set."""
    stored_rows = rows = stored_targets = all_targets = 0
    rest = iter(segments)
    while part := list(islice(rest, 4096)):
        entries = store.find(as_keys([key_of_segment(one) for one in part]))
        for one, entry in zip(part, entries, strict=True):
            wanted = wanted_of_segment(one)
            targets = int(wanted.sum())
            if targets:
                hit = entry >= 0 and store.covered(int(entry), wanted)
                stored_rows, rows = stored_rows + bool(hit), rows + 1
                stored_targets, all_targets = stored_targets + targets * bool(hit), all_targets + targets
    return stored_rows, rows, stored_targets, all_targets


@torch.no_grad()
def error_of(store: Signals, teacher: Teacher, device: torch.device) -> Error | None:
    """Ask the loaded teacher again about some sequences whose tokens are kept. KL(teacher || store) with one symbol for
    all ids that are not stored (`tail`); of drawn ids KL(store || teacher), which is the noise of drawing. None where
    no tokens are kept."""
    values = [
        value for ids, entry in islice(_kept(store), ASKED) for value in _errors(store, teacher, ids, entry, device)
    ]
    joined = np.concatenate(values) if values else np.zeros(0)
    if not len(joined):
        return None
    return Error(mean=float(joined.mean()), largest=float(joined.max()), targets=len(joined))


def _kept(store: Signals) -> Iterator[tuple[np.ndarray, int]]:
    """Token ids and place of the sequences whose ids are kept, one of each shard, then the next of each."""
    samples = [shard.samples() for shard in store.shards]
    for turn in range(max(map(len, samples), default=0)):
        for own in samples:
            if turn < len(own):
                yield own[turn], int(store.find(as_keys([key_of(own[turn])]))[0])


def _errors(
    store: Signals, teacher: Teacher, ids: np.ndarray, entry: int, device: torch.device
) -> Iterator[np.ndarray]:
    if entry < 0:
        return
    stored, _ = store.block(entry)
    batch = _batch(ids, stored).to(device)
    signal = teacher.annotate(batch, Need.DISTRIBUTION)
    decoded = _all_of(store, entry)
    for part, logits in chunks_of(signal, batch.mask, store.codec.vocab_size):
        log_p = torch.log_softmax(logits.double() / store.codec.temperature, dim=-1).cpu()
        log_s, at = torch.from_numpy(decoded.logprobs[part]).double(), torch.from_numpy(decoded.ids[part])
        yield (_noise(log_p, log_s, at) if store.codec.sampled else _under_tail(log_p, log_s, at)).numpy()


def _under_tail(log_p: Tensor, log_s: Tensor, ids: Tensor) -> Tensor:
    p = torch.where(log_s == -math.inf, 0.0, log_p.gather(-1, ids).exp())
    kept = torch.where(p > 0, p * (p.log() - log_s), 0.0).sum(-1)
    rest_p, rest_s = (1 - p.sum(-1)).clamp(min=1e-12), (1 - log_s.exp().sum(-1)).clamp(min=2.0**-23)
    whole = log_p.shape[-1] == ids.shape[-1]
    return kept if whole else kept + rest_p * (rest_p.log() - rest_s.log())


def _noise(log_p: Tensor, log_s: Tensor, ids: Tensor) -> Tensor:
    share = log_s.exp()
    return torch.where(share > 0, share * (log_s - log_p.gather(-1, ids)), 0.0).sum(-1)


def _all_of(store: Signals, entry: int) -> Decoded:
    stored, _ = store.block(entry)
    return store.read([entry], [stored])


def _batch(ids: np.ndarray, stored: np.ndarray) -> Batch:
    """One sequence whose stored targets are supervised."""
    length = len(ids)
    tokens = torch.from_numpy(ids.astype(np.int64))
    return Batch(
        input_ids=tokens[None],
        targets=torch.cat([tokens[1:], tokens[-1:]])[None],
        mask=torch.from_numpy(stored.copy())[None],
        attention_mask=torch.ones(1, length, dtype=torch.bool),
        segment=torch.zeros(1, length, dtype=torch.int64),
        weight=torch.ones(1),
    )
