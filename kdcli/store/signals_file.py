"""Arrays in one file, in the safetensors format, read in place: nothing is loaded until it is touched."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from kdcli.store import atomic

DTYPES = {"U64": "<u8", "U32": "<u4", "I32": "<i4", "U8": "|u1"}
NAMES = {np.dtype(code): name for name, code in DTYPES.items()}


class DamagedError(Exception):
    """The file `name` is not as it was written; `what` says in which way."""

    def __init__(self, name: str, what: str) -> None:
        super().__init__(f"{name} {what}")


def to_bytes(arrays: Mapping[str, np.ndarray], facts: Mapping[str, str]) -> bytes:
    """The file's content: `facts` and the arrays in their order, each of which begins at a multiple of its items'
    size if the wider types come first."""
    header: dict[str, Any] = {"__metadata__": dict(facts)}
    place = 0
    for name, array in arrays.items():
        header[name] = {
            "dtype": NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [place, place + array.nbytes],
        }
        place += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *(array.tobytes() for array in arrays.values())])


class MappedFile:
    """The arrays and facts of a file. Reads its header only, and compares the size that it says with the file's.

    Raises DamagedError, FileNotFoundError.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = path.stat().st_size
        try:
            with open(path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if length > min(self.size, 2**27):
                    raise ValueError("no header")
                header = json.loads(file.read(length))
            self.facts: dict[str, str] = header.pop("__metadata__")
            self._begin = 8 + length
            self._arrays = {
                name: (np.dtype(DTYPES[one["dtype"]]), tuple(one["shape"]), one["data_offsets"][0])
                for name, one in header.items()
            }
            end = self._begin + max((one["data_offsets"][1] for one in header.values()), default=0)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise DamagedError(path.name, "has no readable header") from error
        if end != self.size:
            raise DamagedError(path.name, f"has {self.size:,} of {end:,} bytes")
        self._mapped: np.ndarray | None = None

    def __getitem__(self, name: str) -> np.ndarray:
        """An array, on disk."""
        if self._mapped is None:
            self._mapped = np.memmap(self.path, np.uint8, "r")
        dtype, shape, place = self._arrays[name]
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        begin = self._begin + place
        return np.asarray(self._mapped[begin : begin + size]).view(dtype).reshape(shape)


def write_named_by_content(folder: Path, content: bytes) -> str:
    """Write HASH.safetensors, whole or not at all; returns its name."""
    name = f"{xxhash.xxh3_128_hexdigest(content)}.safetensors"
    atomic.write_bytes(folder / name, content)
    return name
