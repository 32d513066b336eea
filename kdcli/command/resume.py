"""`kdcli resume RUN_DIR`: go on with a run from its own config."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from kdcli.command import runs
from kdcli.config import secrets
from kdcli.config.nearest import suggest
from kdcli.errors import ConfigError

USAGE = """usage: kdcli resume RUN_DIR [KEY=VALUE ...]

Goes on with an interrupted or failed run, or trains a finished one for more steps (run.steps=...).
Logging, evaluation and processes may change freely, and an augmentation's budget, prices and concurrency;
the learning rate and its schedule with a warning; models, data (but they may lie elsewhere), steps of an
augmentation, objectives and batch not at all.
"""


def main(argv: Sequence[str]) -> int:
    """Go on; returns the exit code. Raises ConfigError for a folder without a run, or a key that may not change."""
    if "-h" in argv or "--help" in argv:
        print(USAGE, end="")
        return 0
    if not argv or "=" in argv[0] or argv[0].startswith("-"):
        raise ConfigError(f"kdcli resume: which run? {USAGE.splitlines()[0]}")
    problems = secrets.in_arguments(argv[1:])
    if problems:
        raise ConfigError(*problems)
    run_dir = Path(argv[0]).expanduser()
    if not (run_dir / "config.yaml").is_file():
        raise ConfigError(
            f"{run_dir}: is not a run folder (it has no config.yaml); give the folder that a run printed first"
        )
    config = changed(runs.read_config(run_dir), argv[1:])
    config["run"]["dir"] = str(run_dir)
    if owner := config.pop("made_for", None):
        raise ConfigError(f"{run_dir}: holds the rows of a distillation; go on with that: kdcli resume {owner}")
    if any((run_dir / "checkpoints").glob("step-*")) or config["run"].get("resume") == "never":
        config["run"]["resume"] = "auto"  # its own checkpoints, and no longer the one that it began with
    return runs.start(config, overrides=list(argv[1:]))


def changed(config: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """`config` with KEY=VALUE applied, values read as YAML. Raises ConfigError for a key that the config does not have.

    A schedule that ended with the old run.steps ends with the new.
    """
    config = copy.deepcopy(dict(config))
    steps = config["run"].get("steps")
    for override in overrides:
        key, equals, value = override.lstrip("+").partition("=")
        if not equals:
            raise ConfigError(f"{override}: is not KEY=VALUE")
        *parents, last = key.split(".")
        node: Any = config
        for parent in parents:
            node = node.get(parent) if isinstance(node, Mapping) else None
        if not isinstance(node, dict) or last not in node:
            raise ConfigError(f"{key}: the run's config has no such key; {suggest(key, _keys(config))}")
        node[last] = _value(value)
    schedule = config.get("lr_schedule") or {}
    typed = {one.lstrip("+").partition("=")[0] for one in overrides}
    if (
        steps is not None
        and schedule.get("num_training_steps") == steps
        and "lr_schedule.num_training_steps" not in typed
    ):
        schedule["num_training_steps"] = config["run"]["steps"]
    return config


def _value(text: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"{text}: cannot be read as a YAML value; quote it") from None
    number = isinstance(value, str) and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)e[-+]?\d+", value, re.IGNORECASE)
    return float(value) if number else value  # 1e-4 is a number to us, a string to YAML 1.1


def _keys(node: Mapping[str, Any], prefix: str = "") -> list[str]:
    own = [f"{prefix}{key}" for key in node]
    return own + [
        k for key, value in node.items() if isinstance(value, Mapping) for k in _keys(value, f"{prefix}{key}.")
    ]
