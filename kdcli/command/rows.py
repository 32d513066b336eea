"""The rows of a distillation with an augmentation: made once, in a process of its own, and found again by content."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import filelock
import yaml

from kdcli.api import Data
from kdcli.command import manifest
from kdcli.config import augmented, terms
from kdcli.config.build import build
from kdcli.config.check import check
from kdcli.config.schema import SECTIONS
from kdcli.errors import ConfigError, DataError
from kdcli.launch.torchrun import Torchrun
from kdcli.store import atomic, provenance, status
from kdcli.store.content import file_hash

FOLDER = "augmented"  # beside the store of answers


def prepare(run_dir: Path, config: Mapping[str, Any], *, has_results: bool) -> int:
    """See to the rows that `run_dir` learns from; returns 0, or the exit code of what made them.

    A run with results goes on with the rows that it began with. Raises ConfigError where these are gone and the config
    would now make others, or where the distillation cannot use what was made; DataError where it cannot read it.
    """
    known = augmented.note_of(run_dir)
    if not (has_results and known and _intact(Path(known["rows"]), known)):
        pipeline = augmented.pipeline_of(config, _base(config))
        key = pipeline.key()
        if has_results and known and known["key"] != key:
            raise ConfigError(
                f"augmentation: {run_dir} was trained on rows that are gone ({known['rows']}), and data, prompts or "
                "models have changed since, so that others would be made; set these back, or start another run"
            )
        folder = _base(config) / key
        if code := _made(folder, run_dir, config):
            return code
        known = _noted(run_dir, folder, key)
    rows = Path(known["rows"])
    _refuse_unreadable(rows, manifest.read(rows.parent).get("augmentation") or {})
    check(augmented.as_trained(config, rows))
    return 0


def carried(run_dir: Path, config: Mapping[str, Any]) -> None:
    """Note in a run's manifest what its JSONL data say of sources, licences and writers."""
    files = terms.jsonl_files(build(config["data"], Data))
    found = provenance.joined(map(provenance.of_file, files))
    if found.says_something:
        manifest.add(run_dir, {"provenance": provenance.described(found)})


def _base(config: Mapping[str, Any]) -> Path:
    return augmented.answers_of(config).parent / FOLDER


def _intact(rows: Path, known: Mapping[str, Any]) -> bool:
    try:
        return file_hash(rows) == known.get("hash")
    except OSError:
        return False


def _made(folder: Path, run_dir: Path, config: Mapping[str, Any]) -> int:
    """Make the rows in `folder`, unless they are there; two runs that want the same wait for each other."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise ConfigError(f"augment.answers: {folder} beside it cannot be made ({error.strerror})") from None
    lock = filelock.FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        lock.acquire(timeout=0.1)
    except filelock.Timeout:
        print(f"rows: another run makes the same; waiting for it ({folder})", flush=True)
        lock.acquire()
    try:
        made = manifest.read(folder).get("augmentation") or {}
        if status.read(folder).get("state") == "done" and _intact(folder / "rows.jsonl", made):
            print(f"rows: {folder / 'rows.jsonl'}, made before", flush=True)
            return 0
        print(f"rows: made in {folder}", flush=True)
        own = {key: value for key, value in config.items() if key in SECTIONS["augment"]}
        own["run"] = {
            "name": config["run"]["name"],
            "dir": str(folder),
            "seed": config["run"]["seed"],
            "resume": "auto",
        }
        own |= {"launch": {"_target_": "kdcli.launch.torchrun.Torchrun", "processes": 1}, "report": {}}
        own = {"verb": "augment", **own, "made_for": str(run_dir)}
        atomic.write_text(folder / "config.yaml", yaml.safe_dump(own, sort_keys=False, allow_unicode=True, width=120))
        manifest.write(folder, own, ["kdcli", *sys.argv[1:]])
        code = Torchrun()(folder, isolate=True)
        if code:
            _failed(run_dir, folder, config, code)
        return code
    finally:
        lock.release()


def _failed(run_dir: Path, folder: Path, config: Mapping[str, Any], code: int) -> None:
    """The distillation has ended where its rows did."""
    said = status.read(folder)
    state = "interrupted" if code in (130, 143) else "failed"
    steps = config["run"].get("steps", 0)
    reason = f"no rows to train on: {said.get('reason', '')}"
    status.write(run_dir, state, step=0, steps=steps, resumable=False, exit_code=code, reason=reason)
    if state == "failed":
        print(f"the rows are made in {folder}; go on with: kdcli resume {shlex.quote(str(run_dir))}", file=sys.stderr)


def _noted(run_dir: Path, folder: Path, key: str) -> dict[str, Any]:
    """What the run learns from, for its ranks and for its continuation, and in its manifest."""
    rows = folder / "rows.jsonl"
    note = {"key": key, "rows": str(rows), "hash": file_hash(rows)}
    atomic.write_json(run_dir / augmented.NOTE, note)
    made = manifest.read(folder).get("augmentation") or {}
    manifest.add(run_dir, {"augmentation": {"folder": str(folder), **made}})
    return note


def _refuse_unreadable(rows: Path, made: Mapping[str, Any]) -> None:
    """Raises DataError where rows are not finished, or none is there."""
    unreadable, count = made.get("unreadable") or {}, made.get("rows", 0)
    if not count:
        raise DataError(f"{rows}: no row is left to train on; {rows.parent / 'aside.jsonl'} says of each row why")
    if not unreadable:
        return
    reasons = ", ".join(f"{number:,} {reason}" for reason, number in unreadable.items())
    way = "drop them with a step, or finish them"
    if "no response" in unreadable:
        way = "add a step that answers prompts, such as +augmentation@augmentation.answer=label"
    bad = sum(unreadable.values())
    raise DataError(f"augmentation: {bad:,} of {count:,} rows that it makes cannot be trained on ({reasons}); {way}")
