"""status.json: where a run stands, for people, launchers and sweeps."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from kdcli.store import atomic

State = Literal["running", "interrupted", "failed", "done"]


def write(
    run_dir: Path,
    state: State,
    *,
    step: int,
    steps: int,
    resumable: bool,
    exit_code: int | None = None,
    reason: str = "",
) -> None:
    """Replace `run_dir/status.json`. `exit_code` is None while running; `resumable`: a checkpoint exists."""
    atomic.write_json(
        Path(run_dir) / "status.json",
        {
            "state": state,
            "step": step,
            "steps": steps,
            "resumable": resumable,
            "exit_code": exit_code,
            "reason": reason,
            "time": utc_now(),
        },
    )


def read(run_dir: Path) -> dict[str, Any]:
    """What `write` wrote, or {} when there is nothing readable."""
    try:
        return json.loads((Path(run_dir) / "status.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}


def utc_now() -> str:
    """2026-11-21T19:44:44+00:00, whatever the clock's zone and the locale."""
    return datetime.now(UTC).isoformat(timespec="seconds")
