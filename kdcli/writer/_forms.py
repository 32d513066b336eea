"""Forms that a local model's answers are held to, made so short that an answer always ends within its tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

PRINTABLE = r"[ -!#-\[\]-~]"  # ASCII without the quote and the backslash: a byte, and so at most a token, each
BEYOND = r"\x{80}-\x{10FFFF}"
NUMBER = 12  # characters that a number is taken to have
QUANTIFIER = re.compile(r"\*|\+|\{(\d+),\}")
SPACES = (r"\s", " ", r"\n", "[ \t]", r"[ \t]", r"[\s]")


def grammar(form: Mapping[str, Any], characters: int, *, ascii_only: bool) -> str:
    """The form in llguidance's own writing, with at most about `characters` in an answer.

    Strings without a shorter `maxLength`, lists without fewer `maxItems` and repeats without an end share what the
    fixed parts leave. `ascii_only` also keeps characters of more bytes out, and digits from going on.
    """
    from llguidance import LLMatcher

    if "regex" in form:
        return LLMatcher.grammar_from_regex(bounded_regex(str(form["regex"]), characters, ascii_only=ascii_only))
    schema = bounded_schema(form["json"], characters, ascii_only=ascii_only)
    return LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides={"whitespace_flexible": False})


# ------------------------------------------------------------------------------------------------------ JSON schemas


def bounded_schema(schema: Mapping[str, Any], characters: int, *, ascii_only: bool) -> Any:
    """`schema` with lengths; whatever it allows, the given one allows too."""
    items = max(2, min(32, characters // 48))
    fixed, strings = _size(schema, schema, items, 8)
    length = max(1, (characters - fixed) // max(1, strings))
    return _bounded(schema, length, items, ascii_only)


def _size(schema: Any, root: Any, items: int, depth: int) -> tuple[int, int]:
    """Characters of the fixed parts, and how many strings share the rest."""
    if not isinstance(schema, Mapping) or depth == 0:
        return 2, 1
    if "const" in schema or "enum" in schema:
        return max(len(json.dumps(value)) for value in schema.get("enum", [schema.get("const")])), 0
    if isinstance(schema.get("$ref"), str):
        return _size(_referred(schema["$ref"], root), root, items, depth - 1)
    choices = [_size(one, root, items, depth - 1) for key in ("anyOf", "oneOf", "allOf") for one in schema.get(key, ())]
    if choices:
        return max(fixed for fixed, _ in choices), max(strings for _, strings in choices)
    kind = schema.get("type")
    if kind == "object" or "properties" in schema:
        parts = [
            (len(json.dumps(name)) + 2, _size(one, root, items, depth - 1))
            for name, one in schema.get("properties", {}).items()
        ]
        return 2 + sum(key + fixed for key, (fixed, _) in parts), sum(strings for _, (_, strings) in parts)
    if kind == "array":
        number = min(schema.get("maxItems", items), max(items, schema.get("minItems", 0)))
        fixed, strings = _size(schema.get("items", {}), root, items, depth - 1)
        return 2 + number * (fixed + 1), number * strings
    return (NUMBER, 0) if kind in ("number", "integer", "boolean", "null") else (2, 1)


def _referred(name: str, root: Any) -> Any:
    for part in name.removeprefix("#/").split("/"):
        root = root.get(part) if isinstance(root, Mapping) else None
    return root


def _bounded(schema: Any, length: int, items: int, ascii_only: bool) -> Any:
    if not isinstance(schema, Mapping) or "const" in schema or "enum" in schema:
        return schema
    made = dict(schema)
    for key in ("properties", "$defs", "definitions"):
        if isinstance(made.get(key), Mapping):
            made[key] = {name: _bounded(one, length, items, ascii_only) for name, one in made[key].items()}
    for key in ("anyOf", "oneOf", "allOf", "prefixItems"):
        if isinstance(made.get(key), list):
            made[key] = [_bounded(one, length, items, ascii_only) for one in made[key]]
    if isinstance(made.get("items"), Mapping):
        made["items"] = _bounded(made["items"], length, items, ascii_only)
    kind = made.get("type")
    if "properties" in made:
        made.setdefault("additionalProperties", False)
    if kind == "array":
        made["maxItems"] = min(made.get("maxItems", items), max(items, made.get("minItems", 0)))
    if kind == "string" and "format" not in made:
        return _string(made, length, ascii_only)
    if kind in ("number", "integer") and ascii_only:
        return {"type": "integer", "minimum": -9999, "maximum": 9999} | made | {"type": "integer"}
    return made


def _string(made: dict[str, Any], length: int, ascii_only: bool) -> dict[str, Any]:
    least = made.get("minLength", 0)
    most = max(least, min(made.get("maxLength", length), length))
    if "pattern" in made:
        return made | {"pattern": bounded_regex(made["pattern"], length, ascii_only=ascii_only)}
    if ascii_only:
        kept = {key: value for key, value in made.items() if key not in ("minLength", "maxLength")}
        return kept | {"pattern": f"^{PRINTABLE}{{{least},{most}}}$"}
    return made | {"maxLength": most}


# ------------------------------------------------------------------------------------------------- regular expressions


def bounded_regex(pattern: str, characters: int, *, ascii_only: bool) -> str:
    """`pattern` with an end to every repeat: `+`, `*` and `{m,}` of white space once, of others a share each."""
    parts = _parts(pattern)
    shared = [place for place, part in enumerate(parts) if place and _endless(part) and parts[place - 1] not in SPACES]
    fixed = sum(1 for part in parts if not QUANTIFIER.fullmatch(part))
    length = max(1, (characters - fixed) // max(1, len(shared)))
    made = []
    for place, part in enumerate(parts):
        if place and _endless(part):
            least = {"*": 0, "+": 1}.get(part) if part in "*+" else int(part[1:-2])
            most = max(least or 0, length if parts[place - 1] not in SPACES else 1)
            made.append(f"{{{least},{most}}}")
        elif ascii_only and part.startswith("[^"):
            made.append(part[:-1] + BEYOND + "]")
        elif ascii_only and part == ".":
            made.append("[ -~]")
        else:
            made.append(part)
    return "".join(made)


def _endless(part: str) -> bool:
    return QUANTIFIER.fullmatch(part) is not None


def _parts(pattern: str) -> list[str]:
    """A pattern cut into escapes, classes, quantifiers and single characters."""
    found = re.findall(
        r"\\(?:x\{[^}]*\}|[pP]\{[^}]*\}|.)|\[\^?\]?(?:\\.|\[:\w+:\]|[^\]\\])*\]|\{\d*,?\d*\}|.", pattern, re.DOTALL
    )
    assert "".join(found) == pattern, "every character is in one part"
    return found
