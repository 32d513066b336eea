"""Checkpoints that are whole or not there: DESIGN's commit protocol.

All ranks write into `.tmp-step-…`, flush and hash; rank 0 writes COMMIT.json, renames, flushes the folder, and only
then deletes old ones. A folder `step-…` whose files match COMMIT.json is a checkpoint; anything else is skipped.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdcli.api import Engine
from kdcli.errors import ConfigError, KDError
from kdcli.store import atomic
from kdcli.store.content import file_hash
from kdcli.store.fault import fault
from kdcli.train import state as states

log = logging.getLogger(__name__)

FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: where it lies, and its COMMIT.json."""

    path: Path
    commit: dict[str, Any]

    @property
    def step(self) -> int:
        return self.commit["step"]


def save(
    folder: Path,
    engine: Engine,
    *,
    step: int,
    state: Mapping[str, Any],
    note: Mapping[str, Any] | None = None,
    keep: int = 2,
    spare: Path | None = None,
) -> Path:
    """Commit `folder/step-…` and delete all but the newest `keep`, never `spare`. A collective.

    `state`: nested plain values and tensors, rank 0's counts. `note` goes into COMMIT.json. Raises KDError on
    every rank, with nothing but the earlier checkpoints left, when a rank cannot write.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{step:06d}"
    temporary = folder / f".tmp-{final.name}"
    _together(engine, temporary, lambda: _make_empty(temporary, rank=engine.rank))
    _together(engine, temporary, lambda: _write(temporary, engine, state))
    mine: dict[str, dict[str, Any]] = {}
    _together(engine, temporary, lambda: mine.update(_hashes(temporary, engine.rank, engine.world_size)))
    files = {name: entry for part in engine.gather(mine) for name, entry in part.items()}
    commit = {"format": FORMAT, "step": step, "world_size": engine.world_size, **(note or {}), "files": files}
    _together(engine, temporary, lambda: _publish(temporary, final, commit, keep, spare) if engine.rank == 0 else None)
    return final


def load(checkpoint: Checkpoint, engine: Engine) -> dict[str, Any]:
    """Put model, optimizer, schedule and random numbers back; returns the `state` that was saved. A collective."""
    engine.load(checkpoint.path / "engine")
    states.restore_random(checkpoint.path, engine.rank)
    return states.read(checkpoint.path)


def find(folder: Path) -> Checkpoint | None:
    """The newest checkpoint in `folder` that is whole; None when there was never one.

    Warns of each that is damaged, naming the file. Raises ConfigError when all are.
    """
    problems = []
    for path in sorted(folder.glob("step-*"), key=_step, reverse=True):
        try:
            return verify(path)
        except ConfigError as error:
            problems.append(str(error))
            log.warning("skipping a damaged checkpoint: %s", error)
    if problems:
        raise ConfigError(*problems, f"{folder}: no whole checkpoint is left; start again with run.resume=never")
    return None


def newest_commit(folder: Path) -> dict[str, Any] | None:
    """COMMIT.json of the newest checkpoint in `folder` that has one to be read, whether or not the rest is whole."""
    for path in sorted(folder.glob("step-*"), key=_step, reverse=True):
        try:
            return json.loads((path / "COMMIT.json").read_text("utf-8"))
        except (OSError, ValueError):
            continue
    return None


def verify(path: Path) -> Checkpoint:
    """Raises ConfigError naming the first file that is missing, or is not what was written."""
    try:
        commit = json.loads((path / "COMMIT.json").read_text("utf-8"))
        files, _ = commit["files"], commit["step"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(f"{path}: COMMIT.json is missing or cannot be read, so this is no whole checkpoint") from None
    for name, entry in files.items():
        file = path / name
        if not file.is_file():
            raise ConfigError(f"{file}: this file of the checkpoint is missing")
        if file.stat().st_size != entry["size"]:
            raise ConfigError(f"{file}: {file.stat().st_size} bytes, but {entry['size']} were written")
        if file_hash(file) != entry["xxh3"]:
            raise ConfigError(f"{file}: the content is not what was written")
    return Checkpoint(path, commit)


def clean(folder: Path) -> None:
    """Remove what interrupted saves and loads have left."""
    for path in [*folder.glob(".tmp-*"), *folder.glob("step-*/.tmp-*")]:
        log.info("removing the unfinished %s", path.name)
        shutil.rmtree(path, ignore_errors=True)


def abandon_after(folder: Path, step: int) -> None:
    """Set aside what lies beyond `step`: damaged, or of a course that is not the one that now goes on."""
    for path in folder.glob("step-*"):
        if _step(path) > step:
            aside = path.with_name(f"abandoned-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(path, aside)
            log.warning("the run goes on from step %d; %s is now %s", step, path.name, aside.name)


def _together(engine: Engine, temporary: Path, action: Callable[[], None]) -> None:
    """Run `action` on every rank; if it fails on any, remove `temporary` and raise on all."""
    failure: KDError | None = None
    try:
        action()
    except Exception as error:
        needed = _size_of_newest(temporary.parent)
        failure = atomic.no_space(error, temporary.parent, needed) or KDError(f"{type(error).__name__}: {error}")
        log.exception("checkpoint: rank %d could not write %s", engine.rank, temporary.name)
    failures = {rank: error for rank, error in enumerate(engine.gather(failure)) if error is not None}
    if not failures:
        return
    if engine.rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
    rank, first = next(iter(failures.items()))
    raise KDError(f"the checkpoint was not saved (rank {rank}): {first}")


def _make_empty(temporary: Path, rank: int) -> None:
    if rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()


def _write(temporary: Path, engine: Engine, state: Mapping[str, Any]) -> None:
    engine.save(temporary / "engine")
    states.write_random(temporary, engine.rank)
    if engine.rank == 0:
        states.write(temporary, state)


def _hashes(temporary: Path, rank: int, world_size: int) -> dict[str, dict[str, Any]]:
    """Flush and hash this rank's share of the files, whoever wrote them."""
    files = sorted(path for path in temporary.rglob("*") if path.is_file())
    mine = files[rank::world_size]
    for path in mine:
        atomic.fsync_file(path)
    return {str(p.relative_to(temporary)): {"size": p.stat().st_size, "xxh3": file_hash(p)} for p in mine}


def _publish(temporary: Path, final: Path, commit: Mapping[str, Any], keep: int, spare: Path | None) -> None:
    fault("ckpt.before_commit", step=commit["step"])
    atomic.write_json(temporary / "COMMIT.json", commit)
    for path in temporary.rglob("*"):
        if path.is_dir():
            atomic.fsync_folder(path)
    if final.exists():  # a damaged one that was skipped, or an earlier attempt's
        _remove(final)
    os.replace(temporary, final)
    atomic.fsync_folder(final.parent)
    fault("ckpt.after_rename", step=commit["step"])
    for old in sorted(final.parent.glob("step-*"), key=_step)[: -max(keep, 2)]:
        if spare is None or old.resolve() != spare.resolve():
            fault("ckpt.rotate", step=commit["step"])
            _remove(old)


def _remove(path: Path) -> None:
    """Under another name first: what is half deleted must not look like a checkpoint."""
    doomed = path.with_name(f".tmp-old-{path.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _step(path: Path) -> int:
    match = re.fullmatch(r"step-(\d+)", path.name)
    return int(match[1]) if match else -1


def _size_of_newest(folder: Path) -> int | None:
    """Bytes of the newest checkpoint: about what the next one needs."""
    try:
        newest = max(folder.glob("step-*"), key=_step)
        return sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
    except (OSError, ValueError):
        return None
