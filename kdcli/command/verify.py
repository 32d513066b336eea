"""`kdcli verify [objective=NAME]`: the conformance suite of one objective, or of all, with what was measured."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from kdcli.command import catalog, verify_table
from kdcli.config import secrets
from kdcli.config.nearest import suggest
from kdcli.errors import ConfigError

if TYPE_CHECKING:
    from kdcli.train.conformance.suite import Verdict

USAGE = """usage: kdcli verify [objective=NAME,...] [objective.SETTING=VALUE ...] [flags]

Measures whether objectives do what they say: the paper's formula written a second time, zero at the teacher, gradients
against finite differences, top-k bounds, saturated inputs, and that chunks, micro-batches, ranks (two processes too),
packing and padding change nothing. Random models of 2 and 4 layers stand in for student and teacher. Without a name,
every objective; with one, every check. Exit code 1 if one fails.

NAME is an option of the group `objective` (yours in ./configs/objective too), or the class of a package that
KDCLI_PLUGINS names: my_package.losses.Mine.

  --full            every check, also for several objectives
  --json            the same for machines
  --config-dir DIR  look for objective/NAME.yaml in DIR too
  -h, --help        this page

Examples
  kdcli verify
  kdcli verify objective=alpha_beta objective.alpha=0 objective.beta=0.5
  KDCLI_PLUGINS=my_package kdcli verify objective=my_package.losses.Mine
"""
FLAGS = ("--full", "--json", "--config-dir", "--help")


def main(argv: Sequence[str]) -> int:
    """Run the suite and print what it found; returns 1 if a check failed. Raises ConfigError for wrong arguments."""
    if "-h" in argv or "--help" in argv:
        print(USAGE, end="")
        return 0
    problems = secrets.in_arguments(argv)
    if problems:
        raise ConfigError(*problems)
    words = list(argv)
    folders = [Path(folder).expanduser() / "objective" for folder in _taken(words, "--config-dir")]
    flags = [word for word in words if word.startswith("-")]
    for flag in flags:
        if flag not in FLAGS:
            raise ConfigError(f"{flag}: kdcli verify has no such flag; {suggest(flag, FLAGS)}")
    names, overrides = _read([word for word in words if not word.startswith("-")])
    nodes = _nodes(names, overrides, folders)
    verdicts = list(_verdicts(nodes))
    if "--json" in flags:
        print(verify_table.as_json(verdicts))
    else:
        verify_table.show(verdicts, full="--full" in flags or len(verdicts) == 1)
    return 1 if any(verdict.failures for verdict in verdicts) else 0


def _taken(words: list[str], flag: str) -> list[str]:
    """The values of `flag VALUE` and `flag=VALUE`, taken out of `words`."""
    values = []
    for index in range(len(words) - 1, -1, -1):
        if words[index].startswith(f"{flag}="):
            values.append(words.pop(index).partition("=")[2])
        elif words[index] == flag:
            if index + 1 == len(words):
                raise ConfigError(f"{flag}: which folder? give {flag} DIR")
            values.append(words.pop(index + 1))
            words.pop(index)
    return values


def _read(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The chosen objectives, and overrides of their settings without `objective.` in front."""
    names, overrides = [], []
    for word in words:
        key, equals, given = word.partition("=")
        if key == "objective" and given:
            names += given.split(",")
        elif key.startswith("objective.") and equals:
            overrides.append(word.removeprefix("objective."))
        else:
            raise ConfigError(f"{word}: kdcli verify takes objective=NAME and objective.SETTING=VALUE")
    if overrides and not names:
        raise ConfigError(f"objective.{overrides[0]}: of which objective? add objective=NAME")
    return names, overrides


def _nodes(names: Sequence[str], overrides: Sequence[str], folders: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Name -> config of the component, with the overrides applied. Raises ConfigError with all that is wrong."""
    from kdcli.config.check import component_problems

    known = {**catalog.options("objective"), **{f.stem: f for folder in folders for f in folder.glob("*.yaml")}}
    nodes: dict[str, dict[str, Any]] = {}
    problems: list[str] = []
    for name in names or known:
        if name not in known and "." not in name:
            problems.append(f"objective={name}: there is no such option; {suggest(name, known)}")
            continue
        node = yaml.safe_load(known[name].read_text("utf-8")) if name in known else {"_target_": name}
        if not isinstance(node, dict):
            problems.append(f"objective={name}: {known[name]} is not a mapping with a _target_")
            continue
        nodes[name] = _overridden(node, overrides)
        problems += component_problems(nodes[name], "objective", "objective")
    if problems:
        raise ConfigError(*problems)
    return nodes


def _overridden(node: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """`node` with KEY=VALUE applied, values read as YAML."""
    given: dict[str, Any] = {}
    for override in overrides:
        key, _, text = override.partition("=")
        try:
            given[key] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ConfigError(f"objective.{override}: cannot be read as a YAML value; quote it") from None
        if isinstance(given[key], str):
            with contextlib.suppress(ValueError):
                given[key] = float(text)  # 1e-4 is a number to us, a string to YAML 1.1
    return {**node, **given}


def _verdicts(nodes: Mapping[str, Mapping[str, Any]]) -> Iterator[Verdict]:
    """Run the suite on each, naming on a terminal what is being measured."""
    from kdcli.api import Objective
    from kdcli.config.build import build
    from kdcli.config.target import locate
    from kdcli.train.conformance.candidate import Candidate
    from kdcli.train.conformance.suite import run
    from kdcli.train.schedule import start_values

    for number, (name, given) in enumerate(nodes.items(), 1):
        if sys.stderr.isatty():
            print(f"\r\033[K{number}/{len(nodes)} {name}", end="", file=sys.stderr, flush=True)
        node = start_values(given)  # the suite changes settings itself, as a schedule does
        settings = {key: value for key, value in node.items() if key != "_target_"}

        def make(node: Mapping[str, Any] = node, **changes: Any) -> Objective:
            return build({**node, **changes}, Objective)

        candidate = Candidate.of(locate(node["_target_"], "objective"), name=name, make=make, **settings)
        _ = candidate.shapes  # what constructor and `fit` refuse is the user's error, and no failed check
        yield run(candidate)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)
