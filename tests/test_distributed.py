"""The server that processes of tests are forked from."""

from __future__ import annotations

import os
from pathlib import Path

from tests.distributed import run_ranks


def threads_of_the_parent() -> list[str]:
    return [(task / "comm").read_text().strip() for task in Path(f"/proc/{os.getppid()}/task").iterdir()]


def test_it_has_no_threads_though_it_has_imported_everything() -> None:
    """A fork of a process with threads may inherit a lock that nobody holds any more."""
    (found,) = run_ranks(1, threads_of_the_parent, join=False)
    assert len(found) == 1, found
