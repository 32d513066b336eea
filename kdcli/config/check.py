"""Everything that is wrong with a config, at once, before anything heavy loads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kdcli.config import cross, scheduled, secrets
from kdcli.config.nearest import suggest
from kdcli.config.schema import COMPONENTS, OF_AUGMENTATION, SCHEMAS, SECTIONS, TERMS, THIRD_PARTY
from kdcli.config.signature import Setting, component_in, is_component, settings
from kdcli.config.target import locate
from kdcli.config.values import problems_of
from kdcli.errors import ConfigError
from kdcli.train.schedule import is_schedule


def check(config: Mapping[str, Any]) -> None:
    """Compare every key and value with the constructor that will take it, then the sections with each other.

    `config` is plain and resolved, with `verb` as one of its keys. Loads at most tokenizers, never weights.
    Raises ConfigError with one sentence per problem.
    """
    problems = secrets.in_config(config) + shape_problems(config)
    if not problems:  # comparing sections makes sense only where each of them is sound
        problems = cross.problems_in(config)
    if problems:
        raise ConfigError(*problems)


def shape_problems(config: Mapping[str, Any]) -> list[str]:
    """Sections, keys and types that do not fit their constructors."""
    verb = config["verb"]
    known = SECTIONS[verb]
    problems = [
        f"{key}: `kdcli {verb}` has no such section; {suggest(key, known)}"
        for key in config
        if key not in (*known, "verb")
    ]
    for section in known:
        node = config.get(section)
        if section in OF_AUGMENTATION and node is None:
            continue  # all of it has defaults
        if section in SCHEMAS[verb]:
            problems += _section_problems(node, SCHEMAS[verb][section], section)
        elif section in TERMS:
            problems += _terms_problems(node, section)
        elif section in COMPONENTS or section in THIRD_PARTY:
            problems += component_problems(node, section, section)
        elif node is not None and not isinstance(node, str):
            problems.append(f"{section}: is {node!r}, but must be the path of a metric, such as eval/heldout/all/kl")
    return problems


def component_problems(node: Any, group: str, where: str) -> list[str]:
    """Problems of one component: its `_target_`, its settings, and the components inside it."""
    if not is_component(node):
        return [f"{where}: chooses no {group}; write {_choice(group, where)}=NAME, `kdcli ls {group}` lists the names"]
    try:
        target = locate(node["_target_"], group)
    except ConfigError as error:
        return [f"{where}: {error}"]
    known = settings(target, skip=1 if group in THIRD_PARTY else 0)
    given = {key: value for key, value in node.items() if key != "_target_"}
    may_change = group == "objective"
    if known is None:  # it takes any keyword; a schedule is ours to check all the same
        given = {key: value for key, value in given.items() if may_change and is_schedule(value)}
        known = {key: Setting(float, required=False, default=None) for key in given}
    return _settings_problems(given, known, where, f"{target.__name__} has no such setting", may_change)


def _section_problems(node: Any, schema: type, section: str) -> list[str]:
    if not isinstance(node, Mapping):
        return [f"{section}: is {node!r}, but must be a mapping"]
    known = settings(schema)
    assert known is not None
    return _settings_problems(node, known, section, f"`{section}` has no such key")


def _settings_problems(
    given: Mapping[str, Any], known: Mapping[str, Setting], where: str, unknown: str, may_change: bool = False
) -> list[str]:
    """`may_change`: numbers may follow a schedule."""
    problems = []
    for key, value in given.items():
        place = f"{where}.{key}"
        if key not in known:
            problems.append(f"{place}: {unknown}; {suggest(key, known, prefix=where + '.')}")
        elif may_change and is_schedule(value):
            problems += scheduled.problems_in(value, known[key].annotation, place)
        elif found := component_in(known[key].annotation):
            problems += _nested_problems(value, known[key].annotation, found[0], place)
        else:
            wrong = problems_of(value, known[key].annotation, place)
            if wrong and may_change and isinstance(value, Mapping) and scheduled.takes_schedule(known[key].annotation):
                wrong = [f"{wrong[0]}, or a schedule such as {{schedule: linear, start: 2, end: 1}}"]
            problems += wrong or _range_problem(value, known[key].minimum, place)
    problems += [
        f"{where}.{key}: must be given; add {where}.{key}=… to the command"
        for key, setting in known.items()
        if setting.required and key not in given
    ]
    return problems


def _range_problem(value: Any, minimum: float | None, where: str) -> list[str]:
    if minimum is None or not isinstance(value, int | float) or value >= minimum:
        return []
    return [f"{where}: is {value}, but must be at least {minimum}"]


def _nested_problems(value: Any, annotation: Any, group: str, where: str) -> list[str]:
    """Problems of a component, or a mapping or list of components, that is another component's setting."""
    if value is None or value == "???":
        return problems_of(value, annotation, where)
    if isinstance(value, Mapping) and "_target_" not in value:
        return [p for name, node in value.items() for p in component_problems(node, group, f"{where}.{name}")]
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [p for i, node in enumerate(value) for p in component_problems(node, group, f"{where}.{i}")]
    return component_problems(value, group, where)


def _terms_problems(node: Any, section: str) -> list[str]:
    if node is None:
        return []
    if not isinstance(node, Mapping) or "_target_" in node:
        return [f"{section}: maps names to components; choose one by `{section}@{section}.NAME=OPTION`"]
    return [
        problem
        for name, term in node.items()
        if term is not None
        for problem in component_problems(term, section, f"{section}.{name}")
    ]


def _choice(group: str, where: str) -> str:
    return where if group == where else f"{group}@{where}"
