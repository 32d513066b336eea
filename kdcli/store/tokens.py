"""Tokenized examples on disk: Arrow files, memory-mapped, a row found in constant time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa

IDS, FLAGS = pa.list_(pa.int32()), pa.list_(pa.uint8())
SCHEMA = pa.schema(
    [
        ("ids", IDS),
        ("mask", FLAGS),
        ("key", pa.string()),
        ("weight", pa.float64()),
        ("group", pa.string()),
        ("score", pa.float64()),
        ("rejected_ids", IDS),
        ("rejected_mask", FLAGS),
    ]
)
BLOCK = 1024  # rows of a record batch; all but the last are full, so that a row's place is arithmetic


@dataclass(frozen=True, kw_only=True)
class Segment:
    """One tokenized example, or a part of one."""

    ids: np.ndarray  # [T] int32
    mask: np.ndarray  # [T] bool, True where the token itself is to be predicted
    key: str  # of the example's content; a further part of the same example ends in #1, #2, ...
    domain: str = "default"
    weight: float = 1.0
    group: str | None = None
    score: float | None = None
    rejected: tuple[np.ndarray, np.ndarray] | None = None  # ids and mask of prompt + rejected, for preference rows

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Row:
    """What becomes one sequence of a batch: one segment, or several that were packed."""

    segments: tuple[Segment, ...]

    def __len__(self) -> int:
        return sum(len(segment) for segment in self.segments)


class SegmentWriter:
    """Writes segments to a file: `with SegmentWriter(path) as writer: writer.add(segment)`."""

    def __init__(self, path: Path) -> None:
        self._file = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_file(self._file, SCHEMA)
        self._pending: list[dict[str, Any]] = []

    def __enter__(self) -> SegmentWriter:
        return self

    def add(self, segment: Segment) -> None:
        ids, mask = segment.rejected or (None, None)
        self._pending.append(
            {
                "ids": segment.ids,
                "mask": segment.mask.astype(np.uint8),
                "key": segment.key,
                "weight": segment.weight,
                "group": segment.group,
                "score": segment.score,
                "rejected_ids": ids,
                "rejected_mask": None if mask is None else mask.astype(np.uint8),
            }
        )
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
        self._blocks: dict[int, dict[str, Any]] = {}
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
        block, row = self._block(index // BLOCK), index % BLOCK
        ids, mask = _values(block["rejected_ids"][row]), _values(block["rejected_mask"][row])
        return Segment(
            ids=_values(block["ids"][row]),
            mask=_values(block["mask"][row]).view(bool),
            domain=self._domain,
            rejected=None if ids is None else (ids, mask.view(bool)),
            **{name: block[name][row].as_py() for name in ("key", "weight", "group", "score")},
        )

    def lengths(self) -> np.ndarray:
        """Tokens of each segment, [len(self)] int64."""
        batches = (self._reader.get_batch(number) for number in range(self._reader.num_record_batches))
        lengths = [batch.column("ids").value_lengths().to_numpy().astype(np.int64) for batch in batches]
        return np.concatenate(lengths) if lengths else np.zeros(0, np.int64)

    def _block(self, number: int) -> dict[str, Any]:
        if number not in self._blocks:
            batch = self._reader.get_batch(number)
            self._blocks[number] = {name: batch.column(name) for name in SCHEMA.names}
        return self._blocks[number]


class TokenRows(Sequence[Row]):
    """The rows of one domain: segments one by one, or as a packing plan groups them.

    `plan` is (order, starts): row i holds the segments order[starts[i]:starts[i + 1]].
    """

    def __init__(self, segments: Sequence[Segment], plan: tuple[np.ndarray, np.ndarray] | None = None) -> None:
        self.segments = segments
        self.plan = plan

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
        return Row(tuple(self.segments[int(i)] for i in order[starts[index] : starts[index + 1]]))

    def __iter__(self) -> Iterator[Row]:
        return (self[i] for i in range(len(self)))


def _values(scalar: Any) -> Any:
    """A list scalar as a numpy array without a copy; None for null."""
    return scalar.values.to_numpy() if scalar.is_valid else None
