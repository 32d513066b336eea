"""What teachers made of others ask of each other, the student and the data, before weights load."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from kdcli.errors import ConfigError
from kdcli.text.vocabulary import share_ids


def paths_in(node: Any, where: str = "teacher") -> Iterator[tuple[str, str]]:
    """(place, path) of each model and tokenizer that teachers inside a teacher's config name."""
    for key, value in (node or {}).items():
        for name, one in _components(value, f"{where}.{key}"):
            yield from ((f"{name}.{k}", one[k]) for k in ("path", "tokenizer") if isinstance(one.get(k), str))
            yield from paths_in(one, name)


def inside(teacher: Any, where: str = "teacher") -> Iterator[tuple[str, Any]]:
    """A teacher and those that it is made of, by their place in the config."""
    yield where, teacher
    for name, one in getattr(teacher, "parts", {}).items():
        yield from inside(one, f"{where}.{name}")


def problems_in(objects: Mapping[str, Any], tokenizer: Callable[[], Any]) -> list[str]:
    """One sentence per contradiction. `tokenizer`: the student's."""
    return [
        *(p for where, one in inside(objects["teacher"]) if hasattr(one, "check") for p in _refused(one.check, where)),
        *_domains(objects),
        *_prompts(objects),
        *_tokenizers(objects, tokenizer),
        *_constant(objects),
    ]


def _domains(objects: Mapping[str, Any]) -> list[str]:
    """A teacher that chooses by domain knows those of the data, and of what is evaluated."""
    choosing = [(where, one) for where, one in inside(objects["teacher"]) if hasattr(one, "check_domains")]
    data = [(where, item.data) for where, item in objects.items() if hasattr(item, "data") and "evaluation." in where]
    data += [("data", objects["data"])] if objects.get("data") is not None else []
    return [
        f"{problem} (of {source})"
        for where, one in choosing
        for source, rows in data
        for problem in _refused(lambda one=one, rows=rows: one.check_domains(rows.domains()), where)
    ]


def _prompts(objects: Mapping[str, Any]) -> list[str]:
    """A student that teaches itself as it is now has something else to read."""
    data = objects.get("data")
    asking = [where for where, one in inside(objects["teacher"]) if getattr(one, "needs_teacher_prompt", False)]
    if data is None or not asking:
        return []
    if any(row.teacher_prompt is not None for rows in data.domains().values() for row in rows):
        return []
    return [
        f"{where}.mode: current is the student itself, which differs from itself only under another prompt, and no row "
        "of the data has a teacher_prompt; add some, or set mode=ema or snapshot"
        for where in asking
    ]


def _tokenizers(objects: Mapping[str, Any], tokenizer: Callable[[], Any]) -> list[str]:
    """Teachers that must give tokens the student's ids do."""
    problems: list[str] = []
    for where, one in inside(objects["teacher"]):
        for name, bound in getattr(one, "bound", {}).items():
            place = f"{where}.{name}" if name else where
            try:
                theirs, own = bound.load_tokenizer(), tokenizer()
            except ConfigError as error:
                problems += error.problems
                continue
            if theirs is not None and own is not None and not share_ids(theirs.get_vocab(), own.get_vocab()):
                problems.append(
                    f"{place}: its tokenizer is not the student's, and it is asked about the student's own tokens; "
                    "choose one with the student's tokenizer"
                )
    return problems


def _constant(objects: Mapping[str, Any]) -> list[str]:
    """A scheduler that measures the teacher once has a teacher that stays."""
    scheduler = objects.get("domain_scheduler")
    if scheduler is None or not scheduler.signals & {"teacher", "teacher_per_byte"}:
        return []
    return [
        f"{where}: it changes as the student learns, but {type(scheduler).__name__} measures the teacher once; set "
        "mode=snapshot and every=0, or choose another domain_scheduler"
        for where, one in inside(objects["teacher"])
        if getattr(one, "changes", False)
    ]


def _components(value: Any, where: str) -> list[tuple[str, Mapping[str, Any]]]:
    """The components in a setting: one, or several by name."""
    if not isinstance(value, Mapping):
        return []
    if "_target_" in value:
        return [(where, value)]
    return [(f"{where}.{name}", one) for name, one in value.items() if isinstance(one, Mapping) and "_target_" in one]


def _refused(action: Callable[[], Any], where: str) -> list[str]:
    """What `action` refuses; its sentences name places below `teacher`."""
    try:
        action()
    except ConfigError as error:
        return [p.replace("teacher", where, 1) if p.startswith("teacher.") else f"{where}: {p}" for p in error.problems]
    return []
