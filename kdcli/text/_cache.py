"""Folders of tokens on disk: built by one process at a time, visible only when whole."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from kdcli.errors import KDError
from kdcli.store import atomic
from kdcli.store.tokens import Segments
from kdcli.text.bundle import bundle
from kdcli.text.counts import Counts, EncodeReport
from kdcli.text.pack import pack

log = logging.getLogger(__name__)

PATIENCE = 3.0  # seconds


def locked(folder: Path) -> FileLock:
    """The lock of a folder; says so where another process holds it for longer than it takes to look for tokens."""
    lock = FileLock(str(folder.with_suffix(".lock")), mode=0o600)
    try:
        lock.acquire(timeout=PATIENCE)
        lock.release()
    except Timeout:
        log.info("waiting for another process that tokenizes the same data (%s)", folder)
    return lock


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into, which takes `folder`'s place when the block ends well, and vanishes when it does not.

    The caller holds the lock. Raises KDError when the disk is full.
    """
    beside = folder.with_name(f".tmp-{folder.name}")
    shutil.rmtree(beside, ignore_errors=True)  # of a process that was killed
    beside.mkdir(mode=0o700)
    try:
        yield beside
        for file in beside.iterdir():
            atomic.fsync_file(file)
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(beside, folder)
        atomic.fsync_folder(folder.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise KDError(f"no space left on the disk of {folder.parent}; make room, or set KDCLI_CACHE") from error
        raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def write_report(folder: Path, report: EncodeReport) -> None:
    """The report, and the size of every file beside it."""
    sizes = {file.name: file.stat().st_size for file in folder.iterdir()}
    atomic.write_json(folder / "report.json", {"sizes": sizes, "domains": asdict(report)["domains"]})


def read_report(folder: Path) -> EncodeReport | None:
    """The report of a whole folder; None where there is none, or a file is not as it was written."""
    try:
        content = json.loads((folder / "report.json").read_bytes())
        whole = all((folder / name).stat().st_size == size for name, size in content["sizes"].items())
        domains = {name: Counts(**counts) for name, counts in content["domains"].items()}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return EncodeReport(domains=domains, cached=True) if whole else None


def packing_plan(file: Path, segments: Segments, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """The plan of `pack`, made once and kept in `file`."""
    return _kept(file, lambda: pack(segments.lengths(), capacity))


def bundling_plan(file: Path, segments: Segments) -> tuple[np.ndarray, np.ndarray]:
    """The plan of `bundle`, made once and kept in `file`."""
    return _kept(file, lambda: bundle(*(segments.column(name) for name in ("rejected", "group", "score"))))


def _kept(file: Path, plan: Callable[[], tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Memory-mapped, as the segments are."""
    files = [file.with_name(f"{file.name}.{part}.npy") for part in ("order", "starts")]
    if not all(one.exists() for one in files):
        for one, numbers in zip(files, plan(), strict=True):
            buffer = io.BytesIO()
            np.save(buffer, numbers)
            atomic.write_bytes(one, buffer.getvalue())
    order, starts = (np.load(one, mmap_mode="r", allow_pickle=False) for one in files)
    return order, starts
