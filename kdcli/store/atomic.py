"""Files that exist under their name only when whole: write beside, flush to disk, rename, flush the folder."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdcli.errors import KDError


def write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` by `data`; after a crash it holds either the old or the new content."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """`write_bytes` in UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """`write_text` of strict JSON: numbers that are not finite become null."""
    write_text(path, json.dumps(json_safe(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def json_safe(value: Any) -> Any:
    """The same value with NaN and infinities as None, tuples as lists, paths as strings."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): json_safe(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [json_safe(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def fsync_file(path: Path) -> None:
    """Flush a file's content to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_folder(path: Path) -> None:
    """Flush a folder's names to disk, so that a rename in it survives a power cut."""
    fsync_file(path)


def no_space(error: BaseException, path: Path, needed: int | None = None) -> KDError | None:
    """The message for a full disk, or None if `error` is something else.

    `torch.save` reports a full disk as a RuntimeError about a file position, so that counts too when
    less than 1 MiB (or than `needed` bytes) is left.
    """
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    free = shutil.disk_usage(path).free
    if not full and not (isinstance(error, RuntimeError) and free < (needed or 2**20)):
        return None
    need = f"about {_megabytes(needed)} are needed, " if needed else ""
    return KDError(f"no space left on the disk of {path}: {need}{_megabytes(free)} are free; make room and resume")


def _megabytes(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"
