"""Which classes a config may name: a `_target_` is data until it is found in this allow-list (DESIGN 1.2)."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import metadata
from inspect import isabstract, isclass
from typing import Any

from kdcli.config.nearest import suggest
from kdcli.config.schema import COMPONENTS, TERMS, THIRD_PARTY
from kdcli.errors import ConfigError

OPTIMIZER = re.compile(r"torch\.optim\.[A-Z]\w*")
SCHEDULE = re.compile(r"torch\.optim\.lr_scheduler\.[A-Z]\w*|transformers\.get_\w*schedule\w*")
FORBIDDEN_KEYS = ("_args_", "_partial_", "_recursive_", "_convert_", "()")


def problem_of(target: Any, group: str) -> str | None:
    """Why `target` may not stand in `group`, or None where it may. Imports nothing."""
    if not isinstance(target, str):
        return f"_target_ is {target!r}, not the name of a class"
    if group == "optimizer":
        ok = OPTIMIZER.fullmatch(target)
        wanted = "a torch.optim optimizer"
    elif group == "lr_schedule":
        ok = SCHEDULE.fullmatch(target)
        wanted = "a torch.optim.lr_scheduler class or a transformers.get_…_schedule… function"
    else:
        ok = re.fullmatch(rf"kdcli\.{group}\.[a-z]\w*\.[A-Z]\w*", target) or _from_plugin(target, group)
        wanted = (
            f"a class of kdcli.{group}, an entry point of the group kdcli.{group}, or one of a package in KDCLI_PLUGINS"
        )
    return None if ok else f"_target_ {target} is not allowed here; it must be {wanted}"


def problems_in(node: Any, where: str = "") -> list[str]:
    """Every `_target_` of a tree that no group allows, and every key that would run code another way."""
    problems: list[str] = []
    if isinstance(node, Mapping):
        for key, value in node.items():
            place = f"{where}.{key}" if where else str(key)
            if key in FORBIDDEN_KEYS:
                problems.append(f"{place}: {key} is not allowed in a config")
            elif key == "_target_":
                if all(problem_of(value, group) for group in (*COMPONENTS, *THIRD_PARTY)):
                    problems.append(f"{place}: {value} is not a class that a config may name; `kdcli ls` lists those")
            else:
                problems += problems_in(value, place)
    elif isinstance(node, Sequence) and not isinstance(node, str | bytes):
        for index, value in enumerate(node):
            problems += problems_in(value, f"{where}.{index}")
    return problems


def locate(target: str, group: str) -> Any:
    """The class (or schedule function) that `target` names. Raises ConfigError where it may not stand in `group`,
    does not exist, or does not implement the group's interface."""
    problem = problem_of(target, group)
    if problem:
        raise ConfigError(problem)
    module_name, _, name = target.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and module_name.startswith(error.name):
            raise ConfigError(f"_target_ {target}: there is no module {error.name}; see `kdcli ls {group}`") from None
        raise ConfigError(f"_target_ {target} needs the package {error.name}: pip install {error.name}") from None
    found = getattr(module, name, None)
    if found is None:
        raise ConfigError(f"_target_ {target}: {module_name} has no {name}; {suggest(name, _classes(module))}")
    interface = _interface(group)
    if interface and not (isclass(found) and issubclass(found, interface) and not isabstract(found)):
        raise ConfigError(f"_target_ {target} is no {interface.__name__}")
    return found


def group_of(interface: type) -> str | None:
    """The config group of an interface of kdcli.api, or None for any other type."""
    if getattr(interface, "__module__", "") != "kdcli.api":
        return None
    return next((group for group, name in COMPONENTS.items() if name == interface.__name__), None)


def is_mapping_of_terms(section: str) -> bool:
    """Whether a root section maps names to components."""
    return section in TERMS


def _interface(group: str) -> type | None:
    if group == "optimizer":
        return importlib.import_module("torch").optim.Optimizer
    if group == "lr_schedule":
        return None
    return getattr(importlib.import_module("kdcli.api"), COMPONENTS[group])


def _classes(module: Any) -> list[str]:
    return [n for n, v in vars(module).items() if isclass(v) and v.__module__ == module.__name__]


def _from_plugin(target: str, group: str) -> bool:
    named = [name.strip() for name in os.environ.get("KDCLI_PLUGINS", "").split(",") if name.strip()]
    return any(target.startswith(f"{package}.") for package in named) or target in _entry_points(group)


@cache
def _entry_points(group: str) -> frozenset[str]:
    return frozenset(point.value.replace(":", ".") for point in metadata.entry_points(group=f"kdcli.{group}"))
