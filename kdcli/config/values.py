"""Does a config value fit a type annotation, and if not, what would."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

Where = str


def problems_of(value: Any, annotation: Any, where: Where) -> list[str]:
    """One sentence per place in `value` that does not fit `annotation`. Unknown annotations fit everything.

    An int fits float, a bool fits neither; a string with `${oc.env:…}` fits everything: it is read later.
    """
    if isinstance(value, str) and "${oc.env:" in value:
        return []
    if value == "???":
        return [f"{where}: must be given; add {where}=… to the command"]
    if _fits(value, annotation):
        return []
    inner = _inner_problems(value, annotation, where)
    return inner or [f"{where}: is {_show(value)}, but must be {describe(annotation)}"]


def describe(annotation: Any) -> str:
    """An annotation in words: `a whole number`, `one of none, t2`, `a list of texts or null`."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return "one of " + ", ".join("null" if p is None else str(p) for p in parts)
    if origin in (Union, types.UnionType):
        plain = [p for p in parts if p in NAMES or get_origin(p) or _is(p, Mapping) or _is(p, Sequence)]
        return " or ".join(describe(part) for part in plain or parts)
    if _is(annotation, Mapping):
        return "a mapping"
    if _is(annotation, Sequence) and annotation is not str:
        element = [p for p in parts if p is not ...]
        return f"a list, each {describe(element[0])}" if element and element[0] is not Any else "a list"
    return NAMES.get(annotation, getattr(annotation, "__name__", str(annotation)))


NAMES: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    Path: "a path",
    None: "null",
    types.NoneType: "null",
}


def _fits(value: Any, annotation: Any) -> bool:
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return any(value == part and type(value) is type(part) for part in parts)
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if annotation in (None, types.NoneType):
        return value is None
    if annotation is bool:
        return isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if annotation is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if annotation in (str, Path):
        return isinstance(value, str)
    if _is(annotation, Mapping):
        return isinstance(value, Mapping) and not _inner_problems(value, annotation, "")
    if _is(annotation, Sequence):
        return _is_list(value) and not _inner_problems(value, annotation, "")
    return annotation is Any or not isinstance(annotation, type) or isinstance(value, annotation)


def _inner_problems(value: Any, annotation: Any, where: Where) -> list[str]:
    """Problems of the elements, where the container itself fits."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        # the one alternative whose container fits, if there is one
        found = [p for part in parts if (p := _inner_problems(value, part, where))]
        return found[0] if len(found) == 1 else []
    if not parts:
        return []
    if _is(annotation, Mapping) and isinstance(value, Mapping):
        return [p for key, item in value.items() for p in problems_of(item, parts[1], f"{where}.{key}")]
    if _is(annotation, Sequence) and _is_list(value):
        if origin is tuple and ... not in parts:
            if len(value) != len(parts):
                return [f"{where}: has {len(value)} elements, but must have {len(parts)}"]
            pairs = list(zip(value, parts, strict=True))
        else:
            pairs = [(item, parts[0]) for item in value]
        return [p for i, (item, part) in enumerate(pairs) for p in problems_of(item, part, f"{where}.{i}")]
    return []


def _is(annotation: Any, kind: type) -> bool:
    origin = get_origin(annotation) or annotation
    return isinstance(origin, type) and issubclass(origin, kind) and origin is not str


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _show(value: Any) -> str:
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
