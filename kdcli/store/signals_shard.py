"""A shard of a store of signals: some sequences in one file, which is named by the hash of its content."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from kdcli.store.content import file_hash
from kdcli.store.fault import fault
from kdcli.store.signals_file import DamagedError, MappedFile, to_bytes, write_named_by_content
from kdcli.store.signals_keys import KEY, as_keys

log = logging.getLogger(__name__)

KEPT = 4  # sequences of a shard whose token ids are kept: what --stats asks the teacher again
FOLDER = "shards"


class Shard:
    """The sequences of a file. A block is which of its positions are stored (a bit each), and their signal.

    Its size is compared when it is opened, its content when it is first read. Raises DamagedError.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = MappedFile(path)
        self.targets = int(self.file.facts["targets"])
        self._offset: np.ndarray | None = None

    def __len__(self) -> int:
        return int(self.file.facts["sequences"])

    def keys(self) -> np.ndarray:
        """[len(self)] of KEY."""
        return self.file["key"].view(KEY)[:, 0]

    def counts(self) -> np.ndarray:
        """[len(self)]: stored targets of each sequence."""
        return self.file["count"]

    def read(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(which positions are stored [T] bool, the signal's bytes) of sequence `number`; on disk still."""
        if self._offset is None:
            self.verify()
            self._offset, self._length, self._data = self.file["offset"], self.file["length"], self.file["data"]
        block = self._data[int(self._offset[number]) : int(self._offset[number + 1])]
        length = int(self._length[number])
        size = -(-length // 8)
        return np.unpackbits(block[:size], count=length).view(bool), block[size:]

    def samples(self) -> list[np.ndarray]:
        """The token ids of its first sequences, as far as they are kept."""
        lengths = self.file["sample_length"]
        return np.split(np.array(self.file["sample_ids"]), np.cumsum(lengths)[:-1]) if len(lengths) else []

    def verify(self) -> None:
        """Read all of the file. Raises DamagedError."""
        if file_hash(self.path) != self.path.stem:
            raise DamagedError(self.path.name, "is not what was written (its checksum differs)")


class ShardWriter:
    """Collects sequences and writes a shard whenever `size` bytes are there: what is not yet a file is lost with the
    process, all else is kept."""

    def __init__(self, store: Path, *, size: int, rank: int = 0) -> None:
        self.folder = store / FOLDER
        self.size = size
        self.rank = rank
        self.written = 0  # bytes
        self.shards = 0
        self._clear()

    def _clear(self) -> None:
        self._keys: list[tuple[int, int]] = []
        self._blocks: list[bytes] = []
        self._lengths: list[int] = []
        self._counts: list[int] = []
        self._samples: list[np.ndarray] = []
        self.held = 0

    def add(self, key: tuple[int, int], stored: np.ndarray, block: bytes, sample: np.ndarray | None) -> None:
        """One sequence: its positions that are stored [T] bool, their signal, and its token ids where they alone are
        what the teacher saw."""
        self._keys.append(key)
        self._blocks += [np.packbits(stored).tobytes(), block]
        self._lengths.append(len(stored))
        self._counts.append(int(stored.sum()))
        if sample is not None and len(self._samples) < KEPT:
            self._samples.append(sample)
        self.held += len(block) + -(-len(stored) // 8)
        if self.held >= self.size:
            self.flush()

    def flush(self) -> None:
        """Write what is held. Raises OSError."""
        if not self._keys:
            return
        fault("cache.shard", rank=self.rank, step=self.shards)
        sizes = [len(a) + len(b) for a, b in zip(self._blocks[::2], self._blocks[1::2], strict=True)]
        arrays = {
            "key": as_keys(self._keys).view("<u8").reshape(-1, 2),
            "offset": np.concatenate([[0], np.cumsum(sizes)]).astype("<u8"),
            "length": np.array(self._lengths, "<u4"),
            "count": np.array(self._counts, "<u4"),
            "sample_length": np.array([len(ids) for ids in self._samples], "<u4"),
            "sample_ids": np.concatenate([np.zeros(0, "<i4"), *self._samples]).astype("<i4"),
            "data": np.frombuffer(b"".join(self._blocks), np.uint8),
        }
        facts = {"sequences": str(len(self._keys)), "targets": str(sum(self._counts)), "format": "kdcli signals 1"}
        content = to_bytes(arrays, facts)
        write_named_by_content(self.folder, content)
        self.written += len(content)
        self.shards += 1
        self._clear()
