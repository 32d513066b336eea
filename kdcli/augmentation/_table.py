"""A multimap from 32-bit tags to row numbers, and records by row number, in files: memory does not grow with them."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

SLOT = 8  # bytes: tag in the upper 32 bits, row number + 1 in the lower; 0 is an empty slot
READ = 16 * SLOT  # bytes read at a probe, mostly enough to meet an empty slot
FULL = 0.5  # share of taken slots at which the table is doubled
CHUNK = 1 << 16  # slots moved at a time when it is


class Records:
    """Byte strings of one width by row number."""

    def __init__(self, path: Path, width: int) -> None:
        self.path = path
        self.width = width
        self.count = 0
        self._file = _open(path)

    def add(self, record: bytes) -> int:
        """Its row number: 0, 1, 2, …"""
        os.pwrite(self._file, record, self.count * self.width)
        self.count += 1
        return self.count - 1

    def get(self, row: int) -> bytes:
        return os.pread(self._file, self.width, row * self.width)

    def close(self) -> None:
        """Give the file up."""
        os.close(self._file)
        self.path.unlink(missing_ok=True)


class Tags:
    """Rows by tag: open addressing with linear probing, the home of a tag being its upper bits, so that the entries of
    a stretch of the file stay together when the table is doubled."""

    def __init__(self, path: Path, *, bits: int = 16) -> None:
        self.path = path
        self.bits = bits
        self.taken = 0
        self._file = _open(path)

    def find(self, tag: int) -> list[int]:
        """The rows added under a tag, in order."""
        rows: list[int] = []
        at = (tag >> (32 - self.bits)) * SLOT
        while True:
            data = os.pread(self._file, READ, at)
            for start in range(0, len(data), SLOT):
                slot = int.from_bytes(data[start : start + SLOT], "little")
                if not slot:
                    return rows
                if slot >> 32 == tag:
                    rows.append((slot & 0xFFFFFFFF) - 1)
            if len(data) < READ:  # beyond the end nothing was written
                return rows
            at += READ

    def add(self, tag: int, row: int) -> None:
        at = (tag >> (32 - self.bits)) * SLOT
        while True:
            data = os.pread(self._file, READ, at)
            data += bytes(READ - len(data))
            for start in range(0, READ, SLOT):
                if data[start : start + SLOT] == b"\0" * SLOT:
                    os.pwrite(self._file, (tag << 32 | (row + 1)).to_bytes(SLOT, "little"), at + start)
                    self.taken += 1
                    if self.taken > FULL * (1 << self.bits):
                        self._double()
                    return
            at += READ

    def close(self) -> None:
        """Give the file up."""
        os.close(self._file)
        self.path.unlink(missing_ok=True)

    def _double(self) -> None:
        """Move all entries to a table of twice the size, a stretch at a time: no run of taken slots is cut."""
        bits = self.bits + 1
        beside = self.path.with_suffix(".larger")
        new = _open(beside)
        carried = np.zeros(0, dtype=np.uint64)
        at = 0
        while data := os.pread(self._file, CHUNK * SLOT, at):
            at += len(data)
            slots = np.concatenate([carried, np.frombuffer(data, dtype=np.uint64)])
            empty = np.flatnonzero(slots == 0)
            cut = len(slots) if len(data) < CHUNK * SLOT else (int(empty[-1]) + 1 if len(empty) else 0)
            carried = slots[cut:]
            _place(new, slots[:cut], bits)
        _place(new, carried, bits)
        os.close(self._file)
        os.replace(beside, self.path)
        self.bits, self._file = bits, new


def _place(file: int, slots: np.ndarray, bits: int) -> None:
    """Write entries at or after their homes, each in the first free place, in the order of their tags."""
    slots = slots[slots != 0]
    if not len(slots):
        return
    slots = slots[np.argsort(slots >> np.uint64(32), kind="stable")]
    homes = (slots >> np.uint64(64 - bits)).astype(np.int64)
    steps = np.arange(len(slots))
    places = np.maximum.accumulate(homes - steps) + steps
    first = int(places[0])
    out = np.zeros(int(places[-1]) - first + 1, dtype=np.uint64)
    out[places - first] = slots
    os.pwrite(file, out.tobytes(), first * SLOT)


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
