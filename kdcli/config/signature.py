"""A constructor's signature is the schema of its config: names, types, what is required."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any, get_args, get_type_hints

from kdcli.config.target import group_of


@dataclass(frozen=True)
class Setting:
    """One setting of a component: its type, and whether it must be given."""

    annotation: Any
    required: bool
    minimum: float | None = None


def settings(target: Callable[..., Any], *, skip: int = 0) -> dict[str, Setting] | None:
    """The settings of a class or function, without its first `skip` parameters; None if it takes any keyword."""
    if is_dataclass(target):
        hints = get_type_hints(target)
        return {f.name: Setting(hints[f.name], f.default is MISSING, f.metadata.get("minimum")) for f in fields(target)}
    parameters = list(inspect.signature(target).parameters.values())[skip:]
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    hints = _hints(target)
    return {
        p.name: Setting(hints.get(p.name, Any), p.default is p.empty)
        for p in parameters
        if p.kind is not p.VAR_POSITIONAL
    }


def component_in(annotation: Any) -> tuple[str, type] | None:
    """(config group, interface) of a parameter that takes a component or a collection of them, else None."""
    if inspect.isclass(annotation):
        group = group_of(annotation)
        return (group, annotation) if group else None
    return next((found for part in get_args(annotation) if (found := component_in(part))), None)


def is_component(value: Any) -> bool:
    """Whether a config value describes an object to build."""
    return isinstance(value, Mapping) and "_target_" in value


def _hints(target: Callable[..., Any]) -> dict[str, Any]:
    try:
        return get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except (NameError, TypeError):  # annotations that exist for a type checker only
        return {}
