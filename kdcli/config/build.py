"""From config to objects: a mapping with a `_target_` becomes an instance of its group's interface."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from kdcli.api import OptimizerFactory, ScheduleFactory
from kdcli.config.environment import expand
from kdcli.config.signature import component_in, settings
from kdcli.config.target import group_of, locate
from kdcli.errors import ConfigError
from kdcli.train.schedule import Schedule, is_schedule, schedule_of, start_values

T = TypeVar("T")


def build(node: Mapping[str, Any], interface: type[T], **extra: Any) -> T:
    """The object that `node` describes; `extra` are constructor arguments that are not config.

    Parameters annotated with an interface (`Data`, `Mapping[str, Data]`, `Sequence[Teacher]`) are built in turn,
    and `${oc.env:NAME}` becomes the variable's value, here and nowhere on disk. A schedule becomes its first value.
    Raises ConfigError for a `_target_` outside the allow-list, unknown settings, or whatever the constructor refuses.
    """
    group = group_of(interface)
    assert group, f"{interface} is no interface of kdcli.api"
    if not isinstance(node, Mapping) or "_target_" not in node:
        raise ConfigError(f"{group}: there is no _target_ to build a {interface.__name__} from")
    return _instance(node, group, extra)


def build_terms(nodes: Mapping[str, Mapping[str, Any]] | None, interface: type[T], **extra: Any) -> dict[str, T]:
    """The named components of `objective`, `evaluation` or `report`; a term that is null is left out."""
    return {name: build(node, interface, **extra) for name, node in (nodes or {}).items() if node is not None}


def build_schedules(nodes: Mapping[str, Mapping[str, Any] | None]) -> dict[tuple[str, str], Schedule]:
    """The schedules of the section `objective`, each at its beginning, by term and setting."""
    return {
        (name, key): schedule_of(expand(value))
        for name, node in nodes.items()
        for key, value in (node or {}).items()
        if is_schedule(value)
    }


def optimizer_factory(node: Mapping[str, Any]) -> OptimizerFactory:
    """What makes the optimizer, once there are parameter groups."""
    return partial(locate(node["_target_"], "optimizer"), **_arguments(node))


def schedule_factory(node: Mapping[str, Any]) -> ScheduleFactory:
    """What makes the learning-rate schedule, once there is an optimizer."""
    return partial(locate(node["_target_"], "lr_schedule"), **_arguments(node))


def _instance(node: Mapping[str, Any], group: str, extra: Mapping[str, Any]) -> Any:
    cls = locate(node["_target_"], group)
    known = settings(cls)
    arguments: dict[str, Any] = {}
    for name, value in (start_values(expand(node)) if group == "objective" else node).items():
        if name == "_target_":
            continue
        if known is not None and name not in known:
            raise ConfigError(f"{group}.{name}: {cls.__name__} has no such setting")
        found = component_in(known[name].annotation) if known is not None else None
        arguments[name] = _nested(value, found[0]) if found else expand(value)
    return cls(**arguments, **extra)


def _nested(value: Any, group: str) -> Any:
    if isinstance(value, Mapping):
        if "_target_" in value:
            return _instance(value, group, {})
        return {name: _nested(item, group) for name, item in value.items()}
    return (
        [_nested(item, group) for item in value]
        if isinstance(value, Sequence) and not isinstance(value, str)
        else value
    )


def _arguments(node: Mapping[str, Any]) -> dict[str, Any]:
    given = {name: expand(value) for name, value in node.items() if name != "_target_"}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
