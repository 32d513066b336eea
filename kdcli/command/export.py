"""`kdcli export RUN_DIR`: a checkpoint of a run as a folder that transformers' from_pretrained loads."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from kdcli.command import runs
from kdcli.config.nearest import nearest, suggest
from kdcli.errors import ConfigError
from kdcli.store import atomic, blueprint

USAGE = """usage: kdcli export RUN_DIR [--checkpoint NAME] [--to FOLDER] [--dtype DTYPE]

Writes a checkpoint of a run as safetensors with tokenizer, generation config and a model card: of any ZeRO stage and
number of processes, with a LoRA adapter merged. It reads the run's folder alone, needs about as much memory as the
largest weight, and leaves the run as it is; a run that is under way may be exported too.

  --checkpoint NAME  step-500, or latest (the default)
  --to FOLDER        a new or empty folder; RUN_DIR/exports/step-000500 by default, where an earlier export is replaced
  --dtype DTYPE      bf16, fp16 or fp32; the run's run.export_dtype by default

Example: kdcli export runs/distill/2026-11-21_19-44-44 --checkpoint step-500 --dtype fp32
"""
WORK = ".export"  # in the run's folder: the config and the log of the export
STEP = re.compile(r"step-0*(\d+)")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"kdcli export: {message}; `kdcli export --help` shows how")


def main(argv: Sequence[str]) -> int:
    """Export; returns the exit code. Raises ConfigError for a folder without a run or a checkpoint, or a used one."""
    if "-h" in argv or "--help" in argv:
        print(USAGE, end="")
        return 0
    asked = _arguments(argv)
    run_dir = Path(asked.run_dir).expanduser()
    config = _config(run_dir)
    checkpoint = _checkpoint(run_dir, asked.checkpoint)
    final = _target(run_dir, checkpoint, asked.to)
    dtype = asked.dtype or config["run"].get("export_dtype", "bf16")
    work = run_dir / WORK
    _make(work)
    content: dict[str, Any] = {
        "verb": "export",
        "run": {"name": config["run"].get("name"), "dir": str(work), "seed": 0},
        "export": {"run": str(run_dir), "checkpoint": str(checkpoint), "to": str(final), "dtype": dtype},
    }
    atomic.write_text(work / "config.yaml", yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
    return _launch(work)


def _launch(work: Path) -> int:
    from kdcli.launch.torchrun import Torchrun

    return Torchrun()(work)


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(prog="kdcli export", add_help=False, allow_abbrev=False)
    parser.add_argument("run_dir", nargs="?")
    parser.add_argument("--checkpoint", default="latest")
    parser.add_argument("--to")
    parser.add_argument("--dtype", choices=["bf16", "fp16", "fp32"])
    known, unknown = parser.parse_known_args(list(argv))
    if unknown:
        flags = [option for action in parser._actions for option in action.option_strings]
        match = nearest(unknown[0].partition("=")[0], flags)
        hint = f"did you mean {match}?" if match else "`kdcli export --help` lists the flags"
        raise ConfigError(f"{unknown[0]}: kdcli export has no such argument; {hint}")
    if known.run_dir is None:
        raise ConfigError(f"kdcli export: which run? {USAGE.splitlines()[0]}")
    return known


def _config(run_dir: Path) -> dict[str, Any]:
    if not (run_dir / "config.yaml").is_file():
        raise ConfigError(
            f"{run_dir}: is not a run folder (it has no config.yaml); give the folder that a run printed first"
        )
    config = runs.read_config(run_dir)
    if config["verb"] != "distill":
        raise ConfigError(f"{run_dir}: is a run of `kdcli {config['verb']}`, which trains no student")
    return config


def _checkpoint(run_dir: Path, name: str) -> Path:
    """The folder of a checkpoint by its name, in any spelling of its number."""
    found = {int(match[1]): path for path in (run_dir / "checkpoints").glob("step-*") if (match := _step(path.name))}
    if not found:
        raise ConfigError(
            f"{run_dir}: has no checkpoint yet; one is made every run.save_every steps, at the end, and when the run "
            f"is interrupted: kdcli resume {run_dir}"
        )
    if not (run_dir / blueprint.FOLDER / blueprint.FILE).is_file():
        raise ConfigError(
            f"{run_dir}: has no {blueprint.FOLDER} folder, because it began before kdcli could export; go on with it "
            f"for a step to make one: kdcli resume {run_dir} run.steps={max(found) + 1}"
        )
    if name == "latest":
        return found[max(found)]
    asked = _step(name) or _step(f"step-{name}")
    if asked is None or int(asked[1]) not in found:
        names = [found[step].name for step in sorted(found)]
        raise ConfigError(f"--checkpoint {name}: {run_dir} has no such checkpoint; {suggest(name, [*names, 'latest'])}")
    return found[int(asked[1])]


def _step(name: str) -> re.Match[str] | None:
    return STEP.fullmatch(name)


def _target(run_dir: Path, checkpoint: Path, to: str | None) -> Path:
    """Where the export goes. What is not ours is never replaced."""
    if to is None:
        return run_dir / "exports" / checkpoint.name
    final = Path(to).expanduser()
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise ConfigError(f"--to {to}: is there already; give a new or an empty folder")
    return final


def _make(work: Path) -> None:
    try:
        work.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{work}: cannot be made ({error.strerror}); kdcli export writes its log there") from None
