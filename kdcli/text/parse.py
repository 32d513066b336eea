"""Reading what a writer wrote: text -> records of fields. The kind and its settings stand in the prompt's file."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

import jsonschema

from kdcli.errors import ConfigError
from kdcli.store.examples import BadRow

Record = dict[str, Any]
LINE = re.compile(r"^\s*(?:\d+[.):]|[-*•])\s+(.+?)\s*$", re.MULTILINE)
FENCE = re.compile(r"```[ \t]*([\w+-]*)[^\n]*\n(.*?)```", re.DOTALL)
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
SETTINGS = {  # kind -> its settings with their defaults; a default of ... must be given
    "text": {"field": "response"},
    "regex": {"pattern": ..., "many": False, "numbers": []},
    "xml": {"tags": ..., "each": None, "numbers": []},  # tags: names, or {tag: field}
    "json": {"schema": ..., "each": None},  # each: the key that holds the list of records
    "lines": {"field": "prompt", "at_least": 1},
    "choice": {"field": ..., "options": ...},  # the last of the options that the answer names
    "number": {"field": "score", "minimum": ..., "maximum": ..., "after": None},  # the first number after that text
    "code": {"field": "response"},  # the last fenced block
}


class Parser:
    """Reads answers as `content` ({kind: ..., settings}) says. Raises ConfigError for an unknown kind or setting."""

    def __init__(self, content: Mapping[str, Any], *, where: str) -> None:
        kind = content.get("kind") if isinstance(content, Mapping) else None
        if kind not in SETTINGS:
            raise ConfigError(f"{where}.kind: is {kind!r}; choose one of {', '.join(SETTINGS)}")
        known = SETTINGS[kind]
        given = {key: value for key, value in content.items() if key != "kind"}
        if unknown := [key for key in given if key not in known]:
            raise ConfigError(f"{where}.{unknown[0]}: {kind} has {', '.join(known)}")
        if missing := [key for key, default in known.items() if default is ... and key not in given]:
            raise ConfigError(f"{where}.{missing[0]}: must be given for kind {kind}")
        self.kind = kind
        self.set = known | given
        try:
            self._prepare()
        except (re.error, jsonschema.SchemaError) as error:
            raise ConfigError(f"{where}: {' '.join(str(error).split())[:200]}") from None

    def __call__(self, text: str) -> list[Record]:
        """The records in an answer, at least one. Raises BadRow with a short reason where it is not as declared."""
        if not text.strip():
            raise BadRow("empty answer", "the answer is empty")
        return getattr(self, f"_{self.kind}")(text)

    def form(self) -> dict[str, Any] | None:
        """What a writer that can hold to a form is told: {"json": schema} or {"regex": pattern}; None: free text."""
        if self.kind == "json":
            return {"json": self.set["schema"]}
        if self.kind == "xml" and not self.set["each"]:
            return {"regex": r"\s*".join(f"<{tag}>[^<]+</{tag}>" for tag in self._tags)}
        if self.kind == "choice":
            return {"regex": "|".join(re.escape(str(option)) for option in self.set["options"])}
        return None

    @property
    def fields(self) -> list[str]:
        """Names that records have."""
        if self.kind == "xml":
            return list(self._tags.values())
        if self.kind == "regex":
            return list(self._pattern.groupindex)
        if self.kind == "json":
            schema = self.set["schema"]
            if self.set["each"]:
                schema = schema["properties"][self.set["each"]]["items"]
            return list(schema.get("properties", {}))
        return [self.set["field"]]

    def _prepare(self) -> None:
        if self.kind == "regex":
            self._pattern = re.compile(self.set["pattern"], re.DOTALL | re.MULTILINE)
        if self.kind == "xml":
            tags = self.set["tags"]
            self._tags = dict(tags) if isinstance(tags, Mapping) else {tag: tag for tag in tags}
        if self.kind == "json":
            jsonschema.Draft202012Validator.check_schema(self.set["schema"])
            self._validator = jsonschema.Draft202012Validator(self.set["schema"])

    def _text(self, text: str) -> list[Record]:
        return [{self.set["field"]: text.strip()}]

    def _regex(self, text: str) -> list[Record]:
        found = [m.groupdict() for m in self._pattern.finditer(text)]
        records = [{k: v.strip() for k, v in one.items() if v is not None} for one in found]
        if not records:
            raise BadRow("no match", "the answer does not match the prompt's pattern")
        return [self._numbered(one) for one in (records if self.set["many"] else records[:1])]

    def _xml(self, text: str) -> list[Record]:
        each = self.set["each"]
        parts = re.findall(rf"<{each}>(.*?)</{each}>", text, re.DOTALL) if each else [text]
        if not parts:
            raise BadRow("missing tag", f"the answer has no <{each}>")
        return [self._numbered(self._tagged(part)) for part in parts]

    def _tagged(self, text: str) -> Record:
        record: Record = {}
        for tag, field in self._tags.items():
            found = re.search(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
            if found is None or not found[1].strip():
                raise BadRow("missing tag", f"the answer has no <{tag}>…</{tag}>, or an empty one")
            record[field] = found[1].strip()
        return record

    def _json(self, text: str) -> list[Record]:
        value = _json_in(text)
        problem = next(iter(self._validator.iter_errors(value)), None)
        if problem is not None:
            place = "".join(f"[{p!r}]" for p in problem.absolute_path) or "its root"
            raise BadRow("wrong JSON", f"the answer's JSON breaks the schema at {place}: {problem.validator}")
        value = value[self.set["each"]] if self.set["each"] else value
        records = value if isinstance(value, list) else [value]
        if not records:
            raise BadRow("empty answer", "the answer's list is empty")
        return [one if isinstance(one, dict) else {"value": one} for one in records]

    def _lines(self, text: str) -> list[Record]:
        found = [line for line in LINE.findall(text) if line.strip()]
        if len(found) < self.set["at_least"]:
            raise BadRow("too few lines", f"the answer lists {len(found)} items, not {self.set['at_least']}")
        return [{self.set["field"]: line} for line in found]

    def _choice(self, text: str) -> list[Record]:
        options = sorted(map(str, self.set["options"]), key=len, reverse=True)
        pattern = "|".join(rf"(?<!\w){re.escape(option)}(?!\w)" for option in options)
        found = re.findall(pattern, text)
        if not found:
            raise BadRow("no choice", f"the answer names none of {', '.join(options)}")
        return [{self.set["field"]: found[-1]}]

    def _number(self, text: str) -> list[Record]:
        after = self.set["after"]
        rest = text.rpartition(after)[2] if after and after in text else text
        found = NUMBER.search(rest)
        if found is None:
            raise BadRow("no number", "the answer has no number")
        value = float(found[0])
        if not self.set["minimum"] <= value <= self.set["maximum"]:
            raise BadRow("number out of range", f"the answer's number is {value:g}")
        return [{self.set["field"]: value}]

    def _code(self, text: str) -> list[Record]:
        blocks = FENCE.findall(text)
        if not blocks:
            raise BadRow("no code", "the answer has no fenced block of code")
        return [{self.set["field"]: blocks[-1][1].strip()}]

    def _numbered(self, record: Record) -> Record:
        for name in self.set["numbers"]:
            found = NUMBER.search(str(record.get(name, "")))
            if found is None or not math.isfinite(float(found[0])):
                raise BadRow("no number", f"the answer's {name} is no number")
            record[name] = float(found[0])
        return record


def _json_in(text: str) -> Any:
    """The JSON of an answer, alone, in a fence, or the first that begins in it. Raises BadRow."""
    candidates = [block for _, block in FENCE.findall(text)][-1:] or [text]
    body = candidates[0].strip()
    try:
        return json.loads(body)
    except ValueError:
        pass
    starts = [i for i, c in enumerate(body) if c in "{["]
    for start in starts[:1]:
        try:
            return json.JSONDecoder().raw_decode(body[start:])[0]
        except ValueError:
            break
    raise BadRow("broken JSON", "the answer holds no whole JSON value")
