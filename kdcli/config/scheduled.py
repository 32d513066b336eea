"""Settings of objectives that follow a schedule: what is wrong with one, and what an objective says to its values."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import product
from types import UnionType
from typing import Any, Union, get_args, get_origin

from kdcli.api import Objective
from kdcli.config.build import build
from kdcli.config.environment import expand
from kdcli.config.nearest import suggest
from kdcli.config.signature import settings
from kdcli.config.values import describe, problems_of
from kdcli.errors import ConfigError
from kdcli.train.schedule import KEY, KINDS, is_schedule, schedule_of, start_values


def problems_in(node: Mapping[str, Any], annotation: Any, where: str) -> list[str]:
    """Problems of one schedule by itself: its kind, its settings, and whether `annotation` is that of a number."""
    if not takes_schedule(annotation):
        return [f"{where}: must be {describe(annotation)}; only a setting that may be any number follows a schedule"]
    kind = str(node[KEY])
    if kind not in KINDS:
        return [f"{where}.{KEY}: there is no schedule {kind}; {suggest(kind, KINDS)}"]
    known = settings(KINDS[kind])
    assert known is not None, "a schedule names its settings"
    problems = []
    for key, value in node.items():
        if key != KEY and key not in known:
            problems.append(f"{where}.{key}: the schedule {kind} has no such setting; {suggest(key, known)}")
        elif key != KEY:
            problems += problems_of(value, known[key].annotation, f"{where}.{key}")
    required = [key for key, setting in known.items() if setting.required]
    form = ", ".join([f"{KEY}: {kind}", *(f"{key}: …" for key in required)])
    problems += [f"{where}.{key}: must be given: {{{form}}}" for key in required if key not in node]
    return problems or _refused(lambda: schedule_of(expand(node)), where)


def takes_schedule(annotation: Any) -> bool:
    """Whether a setting may be any number: a whole number, or one of some values, cannot change little by little."""
    if get_origin(annotation) in (Union, UnionType):
        return any(takes_schedule(part) for part in get_args(annotation))
    return annotation is float


def refusals(node: Mapping[str, Any], where: str) -> list[str]:
    """What an objective's constructor refuses of the numbers between which its schedules move, each with each; and
    settings that it does not keep under their own names, so that nothing would come of changing them."""
    schedules = {key: schedule_of(expand(value)) for key, value in node.items() if is_schedule(value)}
    if not schedules:
        return []
    problems: dict[str, None] = {}  # each once, in order
    anyway = _refused(lambda: build(start_values(expand(node)), Objective), "")
    for values in product(*(dict.fromkeys(schedule.extremes) for schedule in schedules.values())):
        numbers = dict(zip(schedules, values, strict=True))
        try:
            objective = build({**node, **numbers}, Objective)
        except ConfigError as error:
            for problem in error.problems:
                blamed = [key for key in numbers if re.search(rf"\b{key}\b", problem)]
                if not blamed and f": {problem}" not in anyway:
                    blamed = list(numbers)
                problems[f"{_places(where, blamed)}: {problem}"] = None
            continue
        for key, number in numbers.items():
            if getattr(objective, key, None) != number:
                problems[
                    f"{where}.{key}: {type(objective).__name__} does not keep this setting as its attribute {key}, "
                    "so a schedule would change nothing; give a number"
                ] = None
    return list(problems)


def _places(where: str, keys: Iterable[str]) -> str:
    return " with ".join(f"{where}.{key}" for key in keys) or where


def _refused(action: Any, where: str) -> list[str]:
    try:
        action()
    except ConfigError as error:
        return [f"{where}: {problem}" for problem in error.problems]
    return []
