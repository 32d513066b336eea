"""`kdcli evaluate`: score a model, or the student of a run, with any evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdcli.command import hydra_verb
from kdcli.errors import ConfigError


def main(argv: Sequence[str]) -> int:
    """Score what the overrides say; returns the exit code."""
    return hydra_verb.main("evaluate", argv, adjust=student_of_run)


def student_of_run(config: dict[str, Any]) -> None:
    """Where student.path is a run folder, take the student that the run exported.

    Raises ConfigError for a run that has exported none.
    """
    path = (config.get("student") or {}).get("path")
    run_dir = Path(path).expanduser() if isinstance(path, str) and "://" not in path else None
    if run_dir is None or not (run_dir / "manifest.json").is_file():
        return
    if not (run_dir / "student").is_dir():
        raise ConfigError(f"student.path: the run {path} has exported no student yet; finish it: kdcli resume {path}")
    config["student"]["path"] = str(run_dir / "student")
