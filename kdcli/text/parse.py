"""Reading what a writer wrote: text -> records of fields. The kind and its settings stand in the prompt's file."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jsonschema
import referencing

from kdcli.errors import ConfigError
from kdcli.store.examples import BadRow
from kdcli.text.form import form

Record = dict[str, Any]
LONGEST = 200_000  # characters of an answer that is read
STARTS = 50  # places in an answer where JSON may begin
TEXTS = frozenset({"text", "prompt", "response", "chosen", "rejected", "teacher_prompt"})  # of a row; others: any JSON
ITEM = re.compile(r"(?:\(?\d+[.):]|[-*•])\s+(.*)")
FENCE = re.compile(r"```[ \t]*([\w+-]*)[^\n]*\n(.*?)```", re.DOTALL)
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
SETTINGS = {  # kind -> its settings with their defaults; a default of ... must be given
    # the whole answer
    "text": {"field": "response"},
    # named groups of a pattern; `many`: of every match; `form`: the pattern that writers are held to, null: none
    "regex": {"pattern": ..., "many": False, "numbers": {}, "choices": {}, "form": None},
    # tags: names, or {tag: field}; each: the tag around one record, of at most `at_most`; optional: tags that may lack
    "xml": {"tags": ..., "each": None, "at_most": 10, "optional": [], "numbers": {}, "choices": {}},
    # each: the key that holds the list of records
    "json": {"schema": ..., "each": None},
    # items of a list, numbered or with bullets
    "lines": {"field": "prompt", "at_least": 1, "at_most": 50},
    # the last of the options that the answer names
    "choice": {"field": ..., "options": ...},
    # the first number after the last `after`
    "number": {"field": "score", "minimum": ..., "maximum": ..., "after": None},
    # the last fenced block
    "code": {"field": "response", "language": ""},
}  # numbers: {field: [least, greatest]}; choices: {field: [options]}


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
            form(self.kind, self.set)
        except (re.error, jsonschema.SchemaError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise ConfigError(f"{where}: {type(error).__name__}: {' '.join(str(error).split())[:200]}") from None

    def __call__(self, text: str) -> list[Record]:
        """The records in an answer, at least one. Raises BadRow with a short reason where it is not as declared."""
        if not text.strip():
            raise BadRow("empty answer", "the answer is empty")
        if len(text) > LONGEST:
            raise BadRow("answer too long", f"the answer has {len(text)} characters, more than {LONGEST}")
        try:
            records = getattr(self, f"_{self.kind}")(text)
            for record in records:
                _check(record)
        except RecursionError:
            raise BadRow("broken JSON", "the answer's JSON is nested too deeply") from None
        return records

    def form(self) -> dict[str, Any] | None:
        """What a writer that can hold to a form is told: {"json": schema} or {"regex": pattern}; None: free text."""
        return form(self.kind, self.set)

    @property
    def fields(self) -> list[str]:
        """Names that records may have."""
        if self.kind == "xml":
            return list(self._tags.values())
        if self.kind == "regex":
            return list(self._pattern.groupindex)
        if self.kind == "json":
            return list(self._properties)
        return [self.set["field"]]

    @property
    def bounds(self) -> Mapping[str, tuple[float, float]]:
        """The least and greatest value of each number among the fields whose range is declared."""
        if self.kind == "number":
            return {self.set["field"]: (self.set["minimum"], self.set["maximum"])}
        if self.kind == "json":
            found = {name: (one.get("minimum"), one.get("maximum")) for name, one in self._properties.items()}
            return {name: (low, high) for name, (low, high) in found.items() if low is not None and high is not None}
        return {name: (low, high) for name, (low, high) in self.set.get("numbers", {}).items()}

    def _prepare(self) -> None:
        """Compile patterns and check the settings; what is raised becomes a ConfigError."""
        if self.kind == "regex":
            self._pattern = re.compile(self.set["pattern"], re.DOTALL | re.MULTILINE)
        if self.kind == "xml":
            tags = self.set["tags"]
            self._tags = dict(tags) if isinstance(tags, Mapping) else {tag: tag for tag in tags}
        if self.kind == "json":
            schema = self.set["schema"]
            jsonschema.Draft202012Validator.check_schema(schema)
            if remote := [ref for ref in _references(schema) if not ref.startswith("#")]:
                raise ValueError(f"$ref {remote[0]} leads out of the schema")
            self._validator = jsonschema.Draft202012Validator(schema, registry=referencing.Registry())
            inner = schema["properties"][self.set["each"]]["items"] if self.set["each"] else schema
            self._properties = inner.get("properties", {})
        if self.kind == "number" and not self.set["minimum"] <= self.set["maximum"]:
            raise ValueError("minimum lies above maximum")
        if self.kind == "choice" and not self.set["options"]:
            raise ValueError("options are empty")
        names = self.fields
        if stray := [name for key in ("numbers", "choices") for name in self.set.get(key, {}) if name not in names]:
            raise ValueError(f"there is no field {stray[0]}; there are {', '.join(names)}")
        if not names:
            raise ValueError("there is no field: name a group, tag or property")

    def _text(self, text: str) -> list[Record]:
        return [{self.set["field"]: text.strip()}]

    def _regex(self, text: str) -> list[Record]:
        found = [match.groupdict() for match in self._pattern.finditer(text)]
        records = [{name: value.strip() for name, value in one.items() if value is not None} for one in found]
        if not records or not records[0]:
            raise BadRow("no match", "the answer does not match the prompt's pattern")
        return [self._held(one) for one in (records if self.set["many"] else records[:1])]

    def _xml(self, text: str) -> list[Record]:
        each = self.set["each"]
        parts = list(_between(text, each)) if each else [text]
        if not parts:
            raise BadRow("missing tag", f"the answer has no <{each}>")
        return [self._held(self._tagged(part)) for part in parts[: self.set["at_most"]]]

    def _tagged(self, text: str) -> Record:
        record: Record = {}
        for tag, field in self._tags.items():
            found = next(_between(text, tag), "").strip()
            if found:
                record[field] = found
            elif tag not in self.set["optional"]:
                raise BadRow("missing tag", f"the answer has no <{tag}>…</{tag}>, or an empty one")
        return record

    def _json(self, text: str) -> list[Record]:
        value, problem = None, "broken JSON"
        for value in _json_values(text):
            error = next(iter(self._validator.iter_errors(value)), None)
            if error is None:
                break
            place = "".join(f"[{part!r}]" for part in error.absolute_path) or "its root"
            problem = f"the answer's JSON breaks the schema at {place}: {error.validator}"
        else:
            if problem == "broken JSON":
                raise BadRow("broken JSON", "the answer holds no whole JSON value")
            raise BadRow("wrong JSON", problem)
        value = value[self.set["each"]] if self.set["each"] else value
        records = value if isinstance(value, list) else [value]
        if not records:
            raise BadRow("empty answer", "the answer's list is empty")
        return [one if isinstance(one, dict) else {"value": one} for one in records]

    def _lines(self, text: str) -> list[Record]:
        items = [match[1].strip() for line in text.splitlines() if (match := ITEM.match(line.strip()))]
        items = [item for item in items if item][: self.set["at_most"]]
        if len(items) < max(1, self.set["at_least"]):
            raise BadRow("too few lines", f"the answer lists {len(items)} items, not {max(1, self.set['at_least'])}")
        return [{self.set["field"]: item} for item in items]

    def _choice(self, text: str) -> list[Record]:
        options = sorted(map(str, self.set["options"]), key=len, reverse=True)
        pattern = "|".join(rf"(?<!\w){re.escape(option)}(?!\w)" for option in options)
        found = re.findall(pattern, text)
        if not found:
            raise BadRow("no choice", f"the answer names none of {', '.join(options)}")
        return [{self.set["field"]: found[-1]}]

    def _number(self, text: str) -> list[Record]:
        after = self.set["after"]
        if after and after not in text:
            raise BadRow("no number", f"the answer does not say {after!r}")
        rest = text.rpartition(after)[2] if after else text
        return [{self.set["field"]: _number_in(rest, self.set["field"], self.set["minimum"], self.set["maximum"])}]

    def _code(self, text: str) -> list[Record]:
        blocks = [block for _, block in FENCE.findall(text) if block.strip()]
        if not blocks:
            raise BadRow("no code", "the answer has no fenced block of code")
        return [{self.set["field"]: blocks[-1].strip("\n").rstrip()}]

    def _held(self, record: Record) -> Record:
        """The record with its numbers as numbers, and its choices as they are spelled in the file."""
        for name, (low, high) in self.set["numbers"].items():
            if name in record:
                record[name] = _number_in(record[name], name, low, high)
        for name, options in self.set["choices"].items():
            if name in record:
                said = record[name].strip(" .\"'*[]").casefold()
                if said not in (spelled := {str(option).casefold(): str(option) for option in options}):
                    raise BadRow("no choice", f"the answer's {name} is none of {', '.join(spelled.values())}")
                record[name] = spelled[said]
        return record


def _number_in(text: str, name: str, low: float, high: float) -> float:
    found = NUMBER.search(text)
    if found is None:
        raise BadRow("no number", f"the answer's {name} is no number")
    if not low <= (value := float(found[0])) <= high:
        raise BadRow("number out of range", f"the answer's {name} is {value:g}, not from {low:g} to {high:g}")
    return value


def _between(text: str, tag: str) -> Iterator[str]:
    """What stands between each <tag> and the next </tag>."""
    begin, end = f"<{tag}>", f"</{tag}>"
    at = text.find(begin)
    while at >= 0:
        stop = text.find(end, at)
        if stop < 0:
            return
        yield text[at + len(begin) : stop]
        at = text.find(begin, stop)


def _json_values(text: str) -> Iterator[Any]:
    """JSON values that an answer may mean: its last fenced block or all of it, and then what begins inside of it."""
    body = ([block for _, block in FENCE.findall(text)][-1:] or [text])[0].strip()
    decoder = json.JSONDecoder(parse_constant=_no_constant)
    for start in [0, *(match.start() for match in re.finditer(r"[\[{]", body))][:STARTS]:
        try:
            yield decoder.raw_decode(body, start)[0]
        except (ValueError, RecursionError):  # a number of more digits than Python reads is a ValueError too
            continue


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def _references(schema: Any) -> Iterator[str]:
    if isinstance(schema, Mapping):
        if isinstance(schema.get("$ref"), str):
            yield schema["$ref"]
        for value in schema.values():
            yield from _references(value)
    elif isinstance(schema, Sequence) and not isinstance(schema, str):
        for value in schema:
            yield from _references(value)


def _check(record: Record) -> None:
    """Raises BadRow where a record would make a row that no data reader takes."""
    for name, value in record.items():
        if name in TEXTS and (not isinstance(value, str) or not value.strip()):
            raise BadRow(f"no {name}", f"the answer's {name} is empty, or no text")
        if name == "score" and (
            isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300
        ):
            raise BadRow("no number", "the answer's score is no number")
        if name == "messages" and not is_chat(value):
            raise BadRow("no messages", "the answer's messages are no list of role and content with an assistant's")
    for text in _texts(record):
        if "\x00" in text:
            raise BadRow("broken text", "the answer holds a NUL character")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise BadRow("broken text", "the answer holds half a character (a lone surrogate)") from None


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield name
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)


def is_chat(messages: Any) -> bool:
    """Whether a value is a chat with an assistant's turn, none of them empty."""
    whole = isinstance(messages, list) and all(
        isinstance(one, Mapping)
        and one.keys() >= {"role", "content"}
        and all(isinstance(value, str) and value.strip() for value in one.values())
        for one in messages
    )
    return whole and any(one["role"] == "assistant" for one in messages)
