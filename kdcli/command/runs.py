"""From a composed config to a finished run: check it, make or find its folder, write it down, launch."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from kdcli.command import manifest, warned
from kdcli.config.environment import expand
from kdcli.config.resume import Changes, compare, moved
from kdcli.errors import ConfigError
from kdcli.store import atomic, status
from kdcli.store.lock import RunLock

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Folder:
    """A run's folder: new, to go on with, or complete."""

    path: Path
    complete: bool = False


def start(config: dict[str, Any], *, overrides: Sequence[str], timed: bool = False, isolate: bool = False) -> int:
    """Check, prepare the folder, launch; returns the exit code. `timed`: run.dir ends in a time, so a folder of that
    name is another run's. Raises ConfigError, before anything is written."""
    from kdcli.api import Launcher
    from kdcli.config.build import build
    from kdcli.config.check import check

    if not NAME.fullmatch(str(config["run"].get("name"))):
        raise ConfigError(f"run.name: {config['run'].get('name')!r} is not made of letters, digits, . _ - only")
    check(config)
    warned.tell(config)
    if timed and _on_each_node(config):
        raise ConfigError(
            "run.dir: every node needs the same run folder; add run.dir=FOLDER, on a shared disk, to the command"
        )
    _agrees_with_checkpoint(config)
    folder = open_folder(config, timed=timed)
    if folder.complete:
        more = "set another run.dir" if config["verb"] == "augment" else "give more run.steps, or another run.dir,"
        print(f"{folder.path}: already complete; {more} to {'make other rows' if 'set' in more else 'train on'}")
        return 0
    config["run"]["dir"] = str(folder.path)
    with _lock(folder.path, config):
        write(folder.path, config, overrides)
    print(f"run: {folder.path}", flush=True)
    if config["verb"] == "distill":
        from kdcli.command import rows  # here, because it imports torch

        if not any((config.get("augmentation") or {}).values()):
            rows.carried(folder.path, config)
        elif code := rows.prepare(folder.path, config, has_results=_has_results(folder.path)):
            return code
    launcher = build(config["launch"], Launcher)
    return launcher(folder.path, isolate=isolate)


def open_folder(config: Mapping[str, Any], *, timed: bool) -> Folder:
    """Make the run folder, or decide that the run in it may go on with this config.

    Raises ConfigError for a folder that is not a run's, that may not be used again, or whose config does not agree.
    """
    path = Path(expand(config["run"]["dir"])).expanduser()
    try:
        if timed:
            return Folder(_new(path))
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"run.dir: {path} cannot be made ({error.strerror}); set run.dir to a folder you may write"
        ) from None
    old = read_config(path) if (path / "config.yaml").is_file() else None
    if old is None:
        if any(not child.name.startswith(".") for child in path.iterdir()):
            raise ConfigError(f"run.dir: {path} holds files, but no run; set run.dir to a new or an empty folder")
        return Folder(path)
    return _used(path, old, config)


def read_config(run_dir: Path) -> dict[str, Any]:
    """The config of a run folder. Raises ConfigError where it cannot be read."""
    file = run_dir / "config.yaml"
    try:
        config = yaml.safe_load(file.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{file}: cannot be read ({type(error).__name__}); is {run_dir} a run folder?") from None
    if not isinstance(config, dict) or "verb" not in config or "run" not in config:
        raise ConfigError(f"{file}: is not the config of a run; give the folder that a run printed first")
    return config


def write(run_dir: Path, config: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """config.yaml, overrides.yaml (what was typed, and typed again) and manifest.json."""
    atomic.write_text(
        run_dir / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True, width=120)
    )
    file = run_dir / "overrides.yaml"
    typed = (yaml.safe_load(file.read_text("utf-8")) or []) if file.is_file() else []
    again = [one for one in overrides if one not in typed]
    atomic.write_text(file, yaml.safe_dump([*typed, *again], allow_unicode=True))
    manifest.write(run_dir, config, ["kdcli", *sys.argv[1:]])


def _agrees_with_checkpoint(config: Mapping[str, Any]) -> None:
    """A run that begins with another run's checkpoint must not differ from it in what cannot change."""
    resume = config["run"].get("resume", "auto")
    if resume in ("auto", "never"):
        return
    path = Path(resume).expanduser()
    owner = path if (path / "config.yaml").is_file() else path.parent.parent
    if (owner / "config.yaml").is_file() and (refusals := _changes(owner, read_config(owner), config).refusals):
        raise ConfigError(
            f"run.resume: {path} is of a run with another config ({'; '.join(refusals[:6])}); set these back"
        )


def _new(path: Path) -> Path:
    """Make `path`, or path-2, path-3, … where it exists: two runs may start in one second."""
    path.parent.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        candidate = path if number == 1 else path.with_name(f"{path.name}-{number}")
        try:
            candidate.mkdir(mode=0o700)
        except FileExistsError:
            number += 1
        else:
            return candidate


def _used(path: Path, old: Mapping[str, Any], config: Mapping[str, Any]) -> Folder:
    if config["run"].get("resume") == "never":
        raise ConfigError(
            f"run.dir: {path} has a run in it, and run.resume=never; set another run.dir, or run.resume=auto"
        )
    with _lock(path, config):
        state = status.read(path)
    changes = _changes(path, old, config)
    if changes.refusals and _has_results(path):
        diff = "; ".join(changes.refusals[:6]) + (
            f"; and {len(changes.refusals) - 6} more" if changes.refusals[6:] else ""
        )
        raise ConfigError(
            f"run.dir: {path} has a run of another config ({diff}); set another run.dir, or go on with that run "
            f"unchanged: kdcli resume {path}"
        )
    steps = config["run"].get("steps", 0)
    done = state.get("state") == "done" and not changes.refusals and steps <= state.get("steps", 0)
    if done and (config["verb"] != "augment" or _same_rows(path, config)):
        return Folder(path, complete=True)
    for change in changes.warnings if _has_results(path) else []:
        print(f"warning: {path} goes on with {change}", file=sys.stderr)
    return Folder(path)


def _changes(run_dir: Path, old: Mapping[str, Any], config: Mapping[str, Any]) -> Changes:
    """What differs from the config of a run; data that lie elsewhere are not other data if their content is equal."""
    changes = compare(old, config)
    if not any(line.startswith("data.") for line in changes.refusals):
        return changes
    from kdcli.api import Data
    from kdcli.config.build import build
    from kdcli.train.checkpoint import newest_commit

    commit = newest_commit(run_dir / "checkpoints") or {}
    same = "source" in commit and commit["source"] == build(config["data"], Data).fingerprint()
    return moved(changes) if same else changes


def _on_each_node(config: Mapping[str, Any]) -> bool:
    """Whether this command is started on several machines at once (torchrun), and not by one for all."""
    return (config["launch"].get("nodes") or 1) > 1 and "rendezvous" in config["launch"]


def _lock(path: Path, config: Mapping[str, Any]) -> AbstractContextManager[Any]:
    """Nobody else runs in the folder. Where every node starts the same command, that is for their rank 0 to see."""
    return nullcontext() if _on_each_node(config) else RunLock(path)


def _has_results(path: Path) -> bool:
    """Whether the run got as far as its first line of metrics, its first checkpoint, or its first step of rows."""
    metrics = path / "metrics.jsonl"
    written = metrics.is_file() and metrics.stat().st_size > 0
    return written or any((path / "checkpoints").glob("step-*")) or any((path / "steps").glob("*/COMMIT.json"))


def _same_rows(path: Path, config: Mapping[str, Any]) -> bool:
    """Whether a finished augmentation would make the same again: its data and prompts are files, which may change."""
    from kdcli.config import augmented

    made = manifest.read(path).get("augmentation") or {}
    same = made.get("key") == augmented.pipeline_of(config, path).key()
    if not same:
        print(f"warning: {path}: its data, prompts or models have changed; steps are done anew", file=sys.stderr)
    return same
