"""The hash of a file's content, by which checkpoints, data and converted models know it."""

from __future__ import annotations

from pathlib import Path

import xxhash

BLOCK = 2**22  # bytes read at a time


def file_hash(path: Path) -> str:
    """xxh3-128 in hexadecimal; guards against corruption, not against an attacker. Raises OSError."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()
