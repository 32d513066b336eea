"""Why a process of a run ended: one small file per rank, so that the launcher can name the first."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from kdcli.store import atomic

FOLDER = ".failures"  # in the run folder, while a run of several processes goes on


@dataclass(frozen=True, kw_only=True)
class Failure:
    """`lost_peer`: this rank only failed because it lost another."""

    rank: int
    exit_code: int
    reason: str
    lost_peer: bool = False
    traceback: str = ""
    time: float = 0.0  # seconds, to order the failures of one machine


def clear(run_dir: Path) -> None:
    """Forget the failures of an earlier attempt."""
    shutil.rmtree(run_dir / FOLDER, ignore_errors=True)


def write(run_dir: Path, failure: Failure) -> None:
    """Leave word for the launcher; a full or read-only disk is no second failure."""
    try:
        (run_dir / FOLDER).mkdir(exist_ok=True)
        atomic.write_json(run_dir / FOLDER / f"{failure.rank}.json", asdict(failure) | {"time": time.time()})
    except OSError:
        return


def first(run_dir: Path) -> Failure | None:
    """The cause: the first to fail of those that did not fail by losing another rank, if there is one."""
    found = []
    for path in (run_dir / FOLDER).glob("*.json"):
        try:
            found.append(Failure(**json.loads(path.read_text("utf-8"))))
        except (ValueError, TypeError):
            continue
    return min(found, key=lambda failure: (failure.lost_peer, failure.time), default=None)
