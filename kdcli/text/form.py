"""Forms that writers are held to, so that what they write parses: a JSON schema, or a pattern in the part of regular
expressions that every engine of constrained decoding has (no look-around, no groups that are named).

Texts in a form have no greatest length: what ended there would look like a whole answer and be a part of one."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any


def form(kind: str, given: Mapping[str, Any]) -> dict[str, Any] | None:
    """The form of answers that a parser of `kind` with the settings `given` reads."""
    if kind == "json":
        return {"json": given["schema"]}
    pattern = {"regex": _regex, "xml": _xml, "lines": _lines, "choice": _choice, "number": _number, "code": _code}
    found = pattern[kind](given) if kind in pattern else None
    return None if found is None else {"regex": found}


def _regex(given: Mapping[str, Any]) -> str | None:
    if given["form"] is not None:
        re.compile(given["form"])
    return given["form"]


def _xml(given: Mapping[str, Any]) -> str:
    tags = given["tags"] if isinstance(given["tags"], Mapping) else {tag: tag for tag in given["tags"]}
    parts = []
    for tag, field in tags.items():
        if field in given["choices"]:
            inside = _any_of(given["choices"][field])
        elif field in given["numbers"]:
            inside = _between(*given["numbers"][field])
        else:
            inside = r"\n?[^<\s]([^<]|<[^/])*"
        parts.append(f"<{tag}>{inside}</{tag}>")
    record = r"\n".join(parts)
    if not given["each"]:
        return record
    one = rf"<{given['each']}>\n{record}\n</{given['each']}>"
    return rf"{one}(\n{one}){{0,{given['at_most'] - 1}}}"


def _lines(given: Mapping[str, Any]) -> str:
    least = max(1, given["at_least"])
    most = max(least, given["at_most"])
    return rf"1\. [^\s][^\n]*(\n[1-9][0-9]?\. [^\s][^\n]*){{{least - 1},{most - 1}}}"


def _choice(given: Mapping[str, Any]) -> str:
    return _any_of(given["options"])


def _number(given: Mapping[str, Any]) -> str:
    number = _between(given["minimum"], given["maximum"])
    if not given["after"]:
        return number
    return rf"([^\n]+\n)?{re.escape(given['after'])} {number}"


def _code(given: Mapping[str, Any]) -> str:
    return rf"```{re.escape(given['language'])}\n[^`\s][^`]*\n```"


def _any_of(options: Iterable[Any]) -> str:
    return "(" + "|".join(re.escape(str(option)) for option in options) + ")"


def _between(low: float, high: float) -> str:
    """Numbers from `low` to `high`: whole ones where these are, in steps of 0.1 or coarser elsewhere."""
    if float(low).is_integer() and float(high).is_integer() and high - low <= 100:
        return _any_of(range(int(low), int(high) + 1))
    step = 10.0 ** math.ceil(math.log10(max(high - low, 1e-9) / 100))  # a hundred numbers at most
    count = math.floor((high - low) / step + 1e-9)
    digits = max(0, -round(math.log10(step)))
    return _any_of(f"{low + number * step:.{digits}f}" for number in range(count + 1))
