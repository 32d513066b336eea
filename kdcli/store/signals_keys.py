"""Which sequence a signal is of: a hash of the tokens that both models see, and of nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import xxhash
from torch import Tensor

from kdcli.api import Batch, TeacherView
from kdcli.errors import ConfigError
from kdcli.store.tokens import Segment

KEY = np.dtype([("high", "<u8"), ("low", "<u8")])


@dataclass(frozen=True, kw_only=True)
class Sequence:
    """One sequence of a batch."""

    number: int  # 0..E-1
    line: int
    start: int  # its first column
    ids: np.ndarray  # [T] int32, with the last target
    wanted: np.ndarray  # [T] bool: where a supervised target is predicted that the teacher has a place for
    key: tuple[int, int]


def key_of(ids: np.ndarray, teacher_ids: np.ndarray | None = None) -> tuple[int, int]:
    """xxh3-128 of the student's ids, and of the teacher's where they are others."""
    own = np.ascontiguousarray(ids, "<i4")
    digest = xxhash.xxh3_128(own.tobytes())
    if teacher_ids is not None and not np.array_equal(ids, teacher_ids):
        digest.update(b"teacher" + np.ascontiguousarray(teacher_ids, "<i4").tobytes())
    number = digest.intdigest()
    return number >> 64, number & (2**64 - 1)


def key_of_segment(segment: Segment) -> tuple[int, int]:
    """The key that the segment will have in a batch. Raises ConfigError for a teacher with another tokenizer."""
    if segment.teacher is not None and segment.teacher.mask is not None:
        raise ConfigError(FOREIGN)
    return key_of(segment.ids, None if segment.teacher is None else segment.teacher.ids)


def wanted_of_segment(segment: Segment) -> np.ndarray:
    """[T] bool: the positions of a segment where its batch will have a supervised target, as `Sequence.wanted`."""
    wanted = np.append(segment.mask[1:], False)
    return wanted if segment.teacher is None else wanted & np.append(segment.teacher.span[1:] >= 0, False)


def as_keys(keys: list[tuple[int, int]]) -> np.ndarray:
    """[E] of KEY."""
    return np.array(keys, KEY) if keys else np.zeros(0, KEY)


def sequences_of(batch: Batch) -> list[Sequence]:
    """The sequences of a batch, in the order in which `batch.mask` comes to their targets. Raises ConfigError for a
    teacher with another tokenizer."""
    view = batch.teacher
    if view is not None and view.foreign:
        raise ConfigError(FOREIGN)
    ids, segment = (one.cpu().numpy() for one in (batch.input_ids, batch.segment))
    wanted, targets = wanted_of(batch).cpu().numpy(), batch.targets.cpu().numpy()
    theirs = None if view is None else list(_of_teacher(view))
    found: list[Sequence] = []
    for line, numbers in enumerate(segment):
        edges = np.flatnonzero(np.diff(numbers, prepend=-1, append=-1))
        spans = [(a, b) for a, b in pairwise(edges) if numbers[a] >= 0]
        for place, (start, stop) in enumerate(spans):
            tokens = ids[line, start:stop]
            if wanted[line, stop - 1]:
                tokens = np.append(tokens, targets[line, stop - 1])
            teacher = None if theirs is None else theirs[line][place]
            known = np.zeros(len(tokens), bool)
            known[: stop - start] = wanted[line, start:stop]
            own_ids = tokens.astype(np.int32)
            key = key_of(own_ids, teacher)
            number = int(numbers[start])
            found.append(Sequence(number=number, line=line, start=int(start), ids=own_ids, wanted=known, key=key))
    return found


def wanted_of(batch: Batch) -> Tensor:
    """[B, T] bool: the supervised targets that the teacher has a place for."""
    return batch.mask if batch.teacher is None else batch.mask & (batch.teacher.position >= 0)


def _of_teacher(view: TeacherView) -> Iterator[list[np.ndarray]]:
    """Of each line the teacher's ids, sequence by sequence: positions begin again with each."""
    ids, real = view.input_ids.cpu().numpy(), view.attention_mask.cpu().numpy().astype(bool)
    positions = None if view.position_ids is None else view.position_ids.cpu().numpy()
    for line in range(len(ids)):
        length = int(real[line].sum())
        own = ids[line, :length].astype(np.int32)
        starts = [0] if positions is None else np.flatnonzero(positions[line, :length] == 0)
        yield np.split(own, starts[1:])


FOREIGN = (
    "teacher: a cache holds what a teacher says of the student's own tokens, and this one has another tokenizer; set "
    "teacher=hf, or choose a student with the teacher's tokenizer"
)
