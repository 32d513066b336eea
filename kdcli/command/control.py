"""`+control=sft` and `run.seeds=[0,1,2]`: one command, the run beside its matched controls, once per seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from kdcli.errors import ConfigError

GROUP = "control"
NONE = "none"  # the option that changes nothing: the run itself
SEEDS = "run.seeds"


@dataclass(frozen=True)
class Plan:
    """What was typed, as a sweep where it asks for several runs; `one` is what a single config is composed of."""

    overrides: list[str]
    one: list[str]
    swept: bool


def plan(verb: str, overrides: Sequence[str]) -> Plan:
    """Of `distill`: `control=a` becomes a sweep over the run itself and `a`, `run.seeds=[0,1]` one over `run.seed`.

    Raises ConfigError for seeds that are no list of different integers, beside run.seed, or in a search.
    """
    if verb != "distill":
        return Plan([*overrides], [*overrides], False)
    jobs, one, swept = [], [], False
    for override in overrides:
        key, equals, value = override.lstrip("+").partition("=")
        if key == GROUP and equals:
            names = [name for name in _items(value) if name != NONE]
            choices = list(dict.fromkeys([NONE, *names]))
            jobs.append(f"{GROUP}={','.join(choices)}")
            one += [f"{GROUP}={names[0]}"] if len(names) == 1 else []
            swept |= len(choices) > 1
        elif key == SEEDS and equals:
            jobs.append(f"run.seed={','.join(map(str, _seeds(value)))}")
            swept = True
        else:
            jobs.append(override)
            one.append(override)
    if swept:
        _refuse(overrides)
    return Plan(jobs, one, swept)


def applied(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config without its section `control`, each section that this names in place of the config's own."""
    return {key: value for key, value in config.items() if key != GROUP} | dict(config.get(GROUP) or {})


def _refuse(overrides: Sequence[str]) -> None:
    if any(one.startswith("hydra/sweeper=") and one != "hydra/sweeper=basic" for one in overrides):
        raise ConfigError(
            "hydra/sweeper: a search draws values, and control and run.seeds want every combination; search first, "
            "then run what it found with them"
        )
    keys = [one.lstrip("+").partition("=")[0] for one in overrides]
    if SEEDS in keys and "run.seed" in keys:
        raise ConfigError("run.seeds: run.seed is given too; keep one of them")


def _seeds(value: str) -> list[int]:
    try:
        found = yaml.safe_load(value)
    except yaml.YAMLError:
        found = None
    given = found if isinstance(found, list) else [found]
    seeds = [seed for seed in given if type(seed) is int and seed >= 0]
    if not seeds or seeds != given or len(set(seeds)) < len(seeds):
        raise ConfigError(f"run.seeds: is {value}, but must be a list of different integers, such as [0,1,2]")
    return seeds


def _items(value: str) -> list[str]:
    """`a`, `a,b` or `[a,b]`."""
    return [item.strip(" '\"") for item in value.strip().removeprefix("[").removesuffix("]").split(",") if item.strip()]
