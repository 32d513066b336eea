"""Forms that a local model's answers are held to, made so short that an answer always ends within its tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from kdcli.writer._patterns import ENOUGH, bounded_regex

TEXT = r"[^\x00-\x1f\x22\x5c]"  # what a string holds without an escape
PRINTABLE = r"[ -!#-\[\]-~]"  # ASCII without the quote and the backslash: a byte, and so at most a token, each
NUMBER = 12  # characters that a number is taken to have


def grammar(form: Mapping[str, Any], characters: int, *, ascii_only: bool) -> str:
    """The form in llguidance's own writing, with at most about `characters` in an answer.

    Strings, lists and repeats that could be longer share what the fixed parts leave. `ascii_only` also keeps characters
    of more bytes out, and digits from going on. Of a JSON schema what llguidance does not know is left to the model.
    """
    from llguidance import LLMatcher

    if "regex" in form:
        return LLMatcher.grammar_from_regex(bounded_regex(str(form["regex"]), characters, ascii_only=ascii_only))
    schema = bounded_schema(form["json"], characters, ascii_only=ascii_only)
    return LLMatcher.grammar_from_json_schema(
        json.dumps(schema), overrides={"whitespace_flexible": False, "lenient": True}
    )


def bounded_schema(schema: Mapping[str, Any], characters: int, *, ascii_only: bool) -> Any:
    """`schema` with lengths; whatever it allows, the given one allows too."""
    length, items = 1, 1
    for items in (32, 16, 8, 4, 2, 1):
        fixed, strings = _size(schema, schema, items, 8)
        length = max(1, (characters - fixed) // max(1, strings))
        if length >= ENOUGH:
            break
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
        number = max(schema.get("minItems", 0), min(schema.get("maxItems", items), items))
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
        made["maxItems"] = max(made.get("minItems", 0), min(made.get("maxItems", items), items))
    if kind == "string" and "format" not in made:
        return _string(made, length, ascii_only)
    if kind in ("number", "integer") and ascii_only:
        return {"type": "integer", "minimum": -9999, "maximum": 9999} | made | {"type": "integer"}
    return made


def _string(made: dict[str, Any], length: int, ascii_only: bool) -> dict[str, Any]:
    least = made.get("minLength", 0)
    most = max(least, min(made.get("maxLength", length), length))
    if "pattern" in made:
        return {key: value for key, value in made.items() if key not in ("minLength", "maxLength")} | {
            "pattern": _ended(made["pattern"], length, ascii_only)
        }
    if ascii_only:
        kept = {key: value for key, value in made.items() if key not in ("minLength", "maxLength")}
        return kept | {"pattern": f"^{PRINTABLE}{{{least},{most}}}$"}
    return made | {"maxLength": most}


def _ended(pattern: str, length: int, ascii_only: bool) -> str:
    """A string's pattern, which may match anywhere in it, with an end to what stands before and behind."""
    begun, ended = pattern.startswith("^"), pattern.endswith("$") and not pattern.endswith(r"\$")
    inner = pattern[begun : len(pattern) - ended]
    around = f"{PRINTABLE if ascii_only else TEXT}*"
    whole = f"{'' if begun else around}({inner}){'' if ended else around}"
    return f"^{bounded_regex(whole, length, ascii_only=ascii_only)}$"
