"""A constructor's signature is the schema of its config: names, types, what is required."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any, Unpack, get_args, get_origin, get_type_hints

from kdcli.config.target import group_of


@dataclass(frozen=True)
class Setting:
    """One setting of a component: its type, whether it must be given, and what it is otherwise."""

    annotation: Any
    required: bool
    default: Any = MISSING
    minimum: float | None = None


def settings(target: Callable[..., Any], *, skip: int = 0) -> dict[str, Setting] | None:
    """The settings of a class or function, without its first `skip` parameters; None if it takes any keyword.

    `**settings: Unpack[Some]` stands for the keys of the TypedDict `Some`, which the base class takes.
    """
    if is_dataclass(target):
        hints = get_type_hints(target, localns=vars(importlib.import_module("kdcli.api")))  # late, because it is heavy
        return {
            f.name: Setting(hints[f.name], f.default is MISSING, f.default, f.metadata.get("minimum"))
            for f in fields(target)
        }
    parameters = list(inspect.signature(target).parameters.values())[skip:]
    hints = _hints(target)
    own = {
        p.name: Setting(hints.get(p.name, Any), p.default is p.empty, p.default)
        for p in parameters
        if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    }
    rest = next((hints.get(p.name) for p in parameters if p.kind is p.VAR_KEYWORD), False)
    if rest is False:
        return own
    if get_origin(rest) is not Unpack or not inspect.isclass(target):
        return None
    defaults = _inherited_defaults(target)
    handed_on = {
        name: Setting(annotation, name not in defaults, defaults.get(name, MISSING))
        for name, annotation in get_type_hints(get_args(rest)[0]).items()
    }
    return handed_on | own


def component_in(annotation: Any) -> tuple[str, type] | None:
    """(config group, interface) of a parameter that takes a component or a collection of them, else None."""
    if inspect.isclass(annotation):
        group = group_of(annotation)
        return (group, annotation) if group else None
    return next((found for part in get_args(annotation) if (found := component_in(part))), None)


def is_component(value: Any) -> bool:
    """Whether a config value describes an object to build."""
    return isinstance(value, Mapping) and "_target_" in value


def _inherited_defaults(target: type) -> dict[str, Any]:
    """Defaults of the constructors of the base classes, the nearest first."""
    found: dict[str, Any] = {}
    for base in target.__mro__[1:]:
        if "__init__" in vars(base):
            parameters = inspect.signature(base.__init__).parameters.values()
            found = {p.name: p.default for p in parameters if p.default is not p.empty} | found
    return found


def _hints(target: Callable[..., Any]) -> dict[str, Any]:
    try:
        return get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except (NameError, TypeError):  # annotations that exist for a type checker only
        return {}
