"""What ranks of every verb do alike."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import xxhash

from kdcli.api import Engine
from kdcli.config.build import build
from kdcli.config.resume import FREE
from kdcli.store import status
from kdcli.train import state

log = logging.getLogger(__name__)


@contextlib.contextmanager
def started(config: Mapping[str, Any]) -> Iterator[Engine]:
    """The engine, joined with the other ranks, and random numbers seeded."""
    engine = build(config["engine"], Engine)
    try:
        engine.start()
        state.seed_random(config["run"]["seed"], engine.rank)
        yield engine
    finally:
        engine.close()


def close(reporters: Any) -> None:
    for reporter in reporters:
        try:
            reporter.close()
        except Exception as error:
            log.warning("%s failed at its end: %s", type(reporter).__name__, error)


def digest(config: Mapping[str, Any]) -> str:
    """A hash of all that a continuation may not change."""
    fixed = {key: value for key, value in config.items() if key not in FREE}
    return xxhash.xxh3_128_hexdigest(json.dumps(fixed, sort_keys=True).encode())


def change_status(
    run_dir: Path, new: status.State, *, exit_code: int | None = None, reason: str = "", steps: int = 0
) -> None:
    """Change the state and keep the step."""
    old = status.read(run_dir)
    steps = steps or old.get("steps", 0)
    may_go_on = new != "done" and resumable(run_dir)
    step = old.get("step", 0)
    with contextlib.suppress(OSError):  # a full disk must not hide what filled it
        status.write(run_dir, new, step=step, steps=steps, resumable=may_go_on, exit_code=exit_code, reason=reason)


def resumable(run_dir: Path) -> bool:
    """Whether there is a checkpoint, or a step of an augmentation, to go on from."""
    return any((run_dir / "checkpoints").glob("step-*")) or any((run_dir / "steps").glob("*"))
