"""Tokenized examples on disk: Arrow files, memory-mapped, a row found in constant time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
import xxhash

IDS, FLAGS = pa.list_(pa.int32()), pa.list_(pa.uint8())
SCHEMA = pa.schema(
    [
        ("ids", IDS),
        ("mask", FLAGS),
        ("key", pa.string()),
        ("weight", pa.float64()),
        ("group", pa.string()),
        ("score", pa.float64()),
        ("rejected", pa.bool_()),
        ("teacher_ids", IDS),
        ("teacher_mask", FLAGS),
        ("span", IDS),
        ("teacher_span", IDS),
    ]
)
PLAIN = ("key", "weight", "group", "score", "rejected")
BLOCK = 1024  # rows of a record batch; all but the last are full, so that a row's place is arithmetic
KEPT = 8192  # record batches, of all files, whose place is remembered: 10 KiB each, and 50 microseconds to find again


@dataclass(frozen=True, kw_only=True)
class TeacherTokens:
    """What the teacher sees of a segment, where that is not what the student sees.

    A span is a stretch of the answer that is tokens of the student beside tokens of the teacher; spans are numbered
    from 0 in the order of the text. With one tokenizer each is one token, and `mask` is None.
    """

    ids: np.ndarray  # [T'] int32
    span: np.ndarray  # [T] int32, of the student's token; -1 where it has no counterpart
    teacher_span: np.ndarray  # [T'] int32
    mask: np.ndarray | None = None  # [T'] bool, True where another tokenizer's token is of the answer


@dataclass(frozen=True, kw_only=True)
class Segment:
    """One tokenized example, a part of one, or one answer of a preference pair."""

    ids: np.ndarray  # [T] int32
    mask: np.ndarray  # [T] bool, True where the token itself is to be predicted
    key: str  # of the example's content; a further part of the same example ends in #1, #2, ...
    domain: str = "default"
    weight: float = 1.0
    group: str | None = None
    score: float | None = None
    rejected: bool = False  # the worse answer of a pair; the segment before it is the better one
    teacher: TeacherTokens | None = None

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Row:
    """What the loader draws at once: one segment, several that were packed into one line of the batch, or (`bundle`)
    the answers of a pair or group, each a line of its own, which always share a micro-batch."""

    segments: tuple[Segment, ...]
    bundle: bool = False

    def lines(self) -> list[tuple[Segment, ...]]:
        """The segments of each line of the batch."""
        return [(segment,) for segment in self.segments] if self.bundle else [self.segments]

    def __len__(self) -> int:
        """Tokens of the longest line."""
        lengths = [len(segment) for segment in self.segments]
        return max(lengths) if self.bundle else sum(lengths)


class SegmentWriter:
    """Writes segments to a file: `with SegmentWriter(path) as writer: writer.add(segment)`."""

    def __init__(self, path: Path) -> None:
        self._file = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_file(self._file, SCHEMA)
        self._pending: list[dict[str, Any]] = []
        self._digest = xxhash.xxh3_128()

    @property
    def digest(self) -> str:
        """A hash of the segments so far, whatever file and version of Arrow they are in."""
        return self._digest.hexdigest()

    def __enter__(self) -> SegmentWriter:
        return self

    def add(self, segment: Segment) -> None:
        row: dict[str, Any] = {
            "ids": segment.ids,
            "mask": segment.mask.astype(np.uint8),
            **{name: getattr(segment, name) for name in PLAIN},
        }
        arrays = [segment.ids, segment.mask]
        if (teacher := segment.teacher) is not None:
            mask = None if teacher.mask is None else teacher.mask.astype(np.uint8)
            row |= {
                "teacher_ids": teacher.ids,
                "teacher_mask": mask,
                "span": teacher.span,
                "teacher_span": teacher.teacher_span,
            }
            arrays += [teacher.ids, teacher.span, teacher.teacher_span, *([] if mask is None else [mask])]
        plain = [row[name] for name in PLAIN]
        self._digest.update(repr((plain, [len(values) for values in arrays])).encode())
        for values in arrays:
            self._digest.update(values.tobytes())
        self._pending.append(row)
        if len(self._pending) == BLOCK:
            self._flush()

    def __exit__(self, *_: object) -> None:
        self._flush()
        self._writer.close()
        self._file.close()

    def _flush(self) -> None:
        if self._pending:
            self._writer.write_batch(pa.RecordBatch.from_pylist(self._pending, SCHEMA))
            self._pending = []


class Segments(Sequence[Segment]):
    """The segments of a file, by index."""

    def __init__(self, path: Path, domain: str) -> None:
        self._reader = pa.ipc.open_file(pa.memory_map(str(path)))
        self._domain = domain
        blocks = self._reader.num_record_batches
        self._length = BLOCK * (blocks - 1) + self._reader.get_batch(blocks - 1).num_rows if blocks else 0

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> Segment: ...
    @overload
    def __getitem__(self, index: slice) -> list[Segment]: ...
    def __getitem__(self, index: int | slice) -> Segment | list[Segment]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(f"segment {index} of {len(self)}")
        block, row = _columns(self._reader, index // BLOCK), index % BLOCK
        return Segment(
            ids=_values(block["ids"][row]),
            mask=_flags(block["mask"][row]),
            domain=self._domain,
            teacher=_teacher(block, row),
            **{name: block[name][row].as_py() for name in PLAIN if name in block},
        )

    def lengths(self) -> np.ndarray:
        """Tokens of each segment, [len(self)] int64."""
        lengths = [batch.column("ids").value_lengths().to_numpy().astype(np.int64) for batch in self._batches()]
        return np.concatenate(lengths) if lengths else np.zeros(0, np.int64)

    def column(self, name: str) -> list[Any]:
        """One plain column (`group`, `score`, `rejected` …) of all segments."""
        return [value for batch in self._batches() for value in batch.column(name).to_pylist()]

    def _batches(self) -> Iterator[Any]:
        return (self._reader.get_batch(number) for number in range(self._reader.num_record_batches))


class TokenRows(Sequence[Row]):
    """The rows of one domain: segments one by one, or as a plan packs or (`bundled`) bundles them.

    `plan` is (order, starts): row i holds the segments order[starts[i]:starts[i + 1]].
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        plan: tuple[np.ndarray, np.ndarray] | None = None,
        bundled: bool = False,
    ) -> None:
        self.segments = segments
        self.plan = plan
        self.bundled = bundled

    def __len__(self) -> int:
        return len(self.segments) if self.plan is None else len(self.plan[1]) - 1

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        if self.plan is None:
            return Row((self.segments[index],))
        order, starts = self.plan
        return Row(tuple(self.segments[int(i)] for i in order[starts[index] : starts[index + 1]]), self.bundled)

    def __iter__(self) -> Iterator[Row]:
        return (self[i] for i in range(len(self)))


@lru_cache(maxsize=KEPT)
def _columns(reader: Any, number: int) -> dict[str, Any]:
    """The columns of a record batch that have values, which stay on disk; of the others not a page is read."""
    columns = zip(SCHEMA.names, reader.get_batch(number).columns, strict=True)
    return {name: column for name, column in columns if column.null_count < len(column)}


def _teacher(block: dict[str, Any], row: int) -> TeacherTokens | None:
    ids = _values(block["teacher_ids"][row]) if "teacher_ids" in block else None
    if ids is None:
        return None
    return TeacherTokens(
        ids=ids,
        span=_values(block["span"][row]),
        teacher_span=_values(block["teacher_span"][row]),
        mask=_flags(block["teacher_mask"][row]) if "teacher_mask" in block else None,
    )


def _values(scalar: Any) -> Any:
    """A list scalar as a numpy array without a copy; None for null."""
    return scalar.values.to_numpy() if scalar.is_valid else None


def _flags(scalar: Any) -> Any:
    values = _values(scalar)
    return None if values is None else values.view(bool)
