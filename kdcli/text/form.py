"""Forms that writers are held to, so that what they write parses: a JSON schema, or a pattern in the part of regular
expressions that every engine of constrained decoding has (no look-around, no groups that are named)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

FREE = 4000  # characters of one field, where nothing else bounds it: a form must come to an end
LEAST = 16  # characters that a field may always have
SEVERAL = 3  # records or items that a short answer is asked for


def form(kind: str, given: Mapping[str, Any], chars: int | None) -> dict[str, Any] | None:
    """The form of answers that a parser of `kind` with the settings `given` reads, of about `chars` characters."""
    if kind == "json":
        return {"json": given["schema"] if chars is None else bounded(given["schema"], chars)}
    pattern = {"regex": _regex, "xml": _xml, "lines": _lines, "choice": _choice, "number": _number, "code": _code}
    found = pattern[kind](given, chars) if kind in pattern else None
    return None if found is None else {"regex": found}


def bounded(schema: Mapping[str, Any], chars: int) -> dict[str, Any]:
    """A schema whose texts and lists end: maxLength and maxItems where it has none."""
    size = max(1, sum(1 for one in _inside(schema) if one.get("type") == "string"))
    longest = max(LEAST, chars // size)

    def ended(part: Any) -> Any:
        if isinstance(part, list):
            return [ended(one) for one in part]
        if not isinstance(part, Mapping):
            return part
        whole = {key: ended(value) for key, value in part.items()}
        if part.get("type") == "string" and not {"enum", "const", "pattern"} & part.keys():
            whole.setdefault("maxLength", longest)
        if part.get("type") == "array":
            whole.setdefault("maxItems", max(SEVERAL, part.get("minItems", 0)))
        return whole

    return ended(schema)


def _inside(schema: Any) -> Iterable[Mapping[str, Any]]:
    if isinstance(schema, Mapping):
        yield schema
        for value in schema.values():
            yield from _inside(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from _inside(value)


def _regex(given: Mapping[str, Any], chars: int | None) -> str | None:
    del chars
    if given["form"] is not None:
        re.compile(given["form"])
    return given["form"]


def _xml(given: Mapping[str, Any], chars: int | None) -> str:
    tags = given["tags"] if isinstance(given["tags"], Mapping) else {tag: tag for tag in given["tags"]}
    most = given["at_most"] if chars is None else min(SEVERAL, given["at_most"])
    longest = _share(chars, len(tags) * (most if given["each"] else 1))
    parts = []
    for tag, field in tags.items():
        if field in given["choices"]:
            inside = _any_of(given["choices"][field])
        elif field in given["numbers"]:
            inside = _between(*given["numbers"][field])
        else:
            inside = rf"\n?[^<\s]([^<]|<[^/]){{0,{longest}}}"
        parts.append(f"<{tag}>{inside}</{tag}>")
    record = r"\n".join(parts)
    if not given["each"]:
        return record
    one = rf"<{given['each']}>\n{record}\n</{given['each']}>"
    return rf"{one}(\n{one}){{0,{most - 1}}}"


def _lines(given: Mapping[str, Any], chars: int | None) -> str:
    least = max(1, given["at_least"])
    most = max(least, given["at_most"] if chars is None else min(SEVERAL, given["at_most"]))
    item = rf"[^\s][^\n]{{0,{_share(chars, most)}}}"
    return rf"1\. {item}(\n[1-9][0-9]?\. {item}){{{least - 1},{most - 1}}}"


def _choice(given: Mapping[str, Any], chars: int | None) -> str:
    del chars
    return _any_of(given["options"])


def _number(given: Mapping[str, Any], chars: int | None) -> str:
    number = _between(given["minimum"], given["maximum"])
    if not given["after"]:
        return number
    return rf"([^\n]{{1,{_share(chars, 1)}}}\n)?{re.escape(given['after'])} {number}"


def _code(given: Mapping[str, Any], chars: int | None) -> str:
    return rf"```{re.escape(given['language'])}\n[^`\s][^`]{{0,{_share(chars, 1)}}}\n```"


def _share(chars: int | None, fields: int) -> int:
    return FREE if chars is None else max(LEAST, chars // fields)


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
