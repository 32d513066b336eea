"""Examples on disk: one JSON object a line, read strictly; every bad row is named by file and line."""

from __future__ import annotations

import difflib
import json
import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import xxhash

from kdcli.api import Example
from kdcli.errors import ConfigError, DataError, KDError
from kdcli.store import atomic

log = logging.getLogger(__name__)

# The four forms of an example: the field that shows which one it is -> the fields it has.
FORMS = {
    "text": ("text",),
    "messages": ("messages",),
    "response": ("prompt", "response"),
    "chosen": ("prompt", "chosen", "rejected"),
}
CONTENT = ("text", "messages", "prompt", "response", "chosen", "rejected", "teacher_prompt")
FIELDS = (*CONTENT, "domain", "group", "score", "weight", "meta")
SHOWN = 5  # bad rows named in one error
NO_PROMPT = "teacher_prompt stands for the prompt, but the row has none; give it with prompt + response"


class BadRow(KDError):
    """One row that cannot be used: a short `reason` to count by, and a sentence."""

    def __init__(self, reason: str, sentence: str) -> None:
        super().__init__(sentence)
        self.reason = reason


class BadRows:
    """What becomes of bad rows: the first few end the run, or up to `max_fraction` of a source is dropped and counted.

    A source is read between `open` and `close`; `reasons` (where -> reason) is kept over all sources.
    """

    def __init__(self, max_fraction: float = 0.0) -> None:
        if not 0.0 <= max_fraction < 1.0:
            raise ConfigError(f"data.max_bad_fraction is {max_fraction}; give a share from 0 to below 1")
        self.max_fraction = max_fraction
        self.reasons: dict[str, str] = {}
        self.open("")

    def open(self, source: str) -> None:
        """Begin a file or data set."""
        self.source = source
        self.rows = 0
        self._bad: list[tuple[str, str]] = []  # reason, sentence with its place

    def add(self, where: str, error: BadRow) -> None:
        """Note a bad row. Raises ConfigError when rows may not be dropped and enough are named."""
        self.reasons[where] = error.reason
        self._bad.append((error.reason, f"{where}: {error}"))
        if not self.max_fraction and len(self._bad) >= SHOWN:
            self.close()

    def close(self) -> None:
        """The end of the source. Raises ConfigError when no row may be bad, DataError when too many are."""
        bad, self._bad = self._bad, []
        if not bad:
            return
        if not self.max_fraction:
            raise ConfigError(*(s for _, s in bad), "Mend these rows, or drop bad rows with data.max_bad_fraction=0.01")
        counts = ", ".join(f"{n} {reason}" for reason, n in Counter(reason for reason, _ in bad).most_common())
        share = f"{self.source}: {len(bad)} of {self.rows} rows are bad ({counts})"
        if len(bad) > self.max_fraction * self.rows:
            raise DataError(
                f"{share}, more than data.max_bad_fraction={self.max_fraction} allows; the first is {bad[0][1]}"
            )
        log.warning("%s and were dropped; the first is %s", share, bad[0][1])


def read_examples(
    path: Path,
    *,
    domain: str,
    columns: Mapping[str, str] | None = None,
    bad: BadRows | None = None,
    unfinished: bool = False,
) -> Iterator[Example]:
    """The examples of a JSONL file in order; a row that names no domain gets `domain`.

    `columns` maps our fields to the file's; `unfinished` reads what an augmentation begins with, see `parse_example`.
    Raises ConfigError or DataError as `bad` says (default: no row may be bad).
    """
    bad = BadRows() if bad is None else bad
    bad.open(str(path))
    for where, line in read_lines(path):
        bad.rows += 1
        try:
            row = parse_line(line)
            yield parse_example(
                row, where=where, domain=domain, columns=columns, first=bad.rows == 1, unfinished=unfinished
            )
        except BadRow as error:
            bad.add(where, error)
    bad.close()


def read_lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """(file:line, content) of each line; empty lines at the end of a file are no rows.

    Raises ConfigError when the file cannot be read.
    """
    empty: list[tuple[str, bytes]] = []
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                empty.append((f"{path}:{number}", line))
                if line.strip():
                    yield from empty
                    empty.clear()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error}); check data.path") from error


def parse_line(line: bytes) -> dict[str, Any]:
    """One line as a JSON object. Raises BadRow."""
    if not line.strip():
        raise BadRow("empty line", "the line is empty; delete it")
    try:
        row = json.loads(line.rstrip().decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise BadRow("not UTF-8", f"byte {error.start + 1} is not UTF-8; save the file as UTF-8") from None
    except RecursionError:
        raise BadRow("broken JSON", "the JSON is nested too deeply") from None
    except ValueError as error:
        text = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        column = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        raise BadRow("broken JSON", f"broken JSON ({text}{column}); write one JSON object a line") from None
    if not isinstance(row, dict):
        raise BadRow("not an object", f"a row must be a JSON object, not {_kind(row)}")
    return row


def parse_example(
    row: Mapping[str, Any],
    *,
    where: str = "",
    domain: str = "default",
    columns: Mapping[str, str] | None = None,
    first: bool = False,
    unfinished: bool = False,
) -> Example:
    """One row as an Example; fields we do not know go to `meta`, null counts as absent.

    `unfinished`: a prompt may lack its response, a chat its last answer, and a row of other columns (a topic, a
    document) all content, as augmentation begins with them. Raises BadRow, or ConfigError when the `first` row of a
    source lacks a column that `columns` names.
    """
    row = _rename(row, columns or {}, where, first)
    row = {key: value for key, value in row.items() if value is not None}
    _check_form(row, unfinished)
    for name in ("text", "prompt", "response", "chosen", "rejected", "teacher_prompt"):
        if name in row:
            _check_text(row[name], name, may_be_blank=name in ("prompt", "teacher_prompt"))
    if "messages" in row:
        _check_messages(row["messages"], unfinished)
    meta = row.get("meta", {})
    if not isinstance(meta, Mapping):
        raise BadRow("wrong type", f"meta must be an object, not {_kind(meta)}")
    return Example(
        **{name: row[name] for name in CONTENT if name in row},
        domain=_label(row, "domain") or domain,
        group=_label(row, "group"),
        score=_number(row, "score"),
        weight=_number(row, "weight", minimum=0.0, default=1.0),
        meta={**{key: value for key, value in row.items() if key not in FIELDS}, **meta},
        where=where,
    )


def dump_example(example: Example) -> bytes:
    """One JSON line, with its newline: the fields that say something, in a fixed order. `where` is not written.

    Raises KDError where `meta` holds what JSON cannot.
    """
    row: dict[str, Any] = {name: value for name in FIELDS if (value := getattr(example, name)) is not None}
    if not row["meta"]:
        del row["meta"]
    if row["weight"] == 1.0:
        del row["weight"]
    try:
        text = json.dumps(row, ensure_ascii=False, allow_nan=False, separators=(", ", ": "))
    except (TypeError, ValueError):  # a number that is not finite, or what another format brought
        try:
            text = json.dumps(atomic.json_safe(row), ensure_ascii=False, default=str)
        except (TypeError, ValueError, RecursionError) as error:
            raise KDError(f"{example.where or 'a row'}: cannot be written as JSON ({error})") from error
    try:
        return text.encode() + b"\n"
    except UnicodeEncodeError:  # half a character, which JSON can only say in ASCII
        return json.dumps(json.loads(text)).encode() + b"\n"


def load_example(line: bytes, *, where: str = "") -> Example:
    """What `dump_example` wrote, unchecked. Raises BadRow where it is no such line."""
    try:
        return Example(**json.loads(line), where=where)
    except (TypeError, ValueError) as error:
        raise BadRow("foreign row", f"{where}: is no row that kdcli wrote ({error})") from None


def content_key(example: Example) -> str:
    """A hash of what the example says, whatever its domain, weight or provenance; of a seed that says nothing yet,
    of its `meta`."""
    content = {name: getattr(example, name) for name in CONTENT if getattr(example, name) is not None}
    said = content or {"meta": example.meta}
    text = json.dumps(said, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)
    return xxhash.xxh3_128_hexdigest(text.encode(errors="surrogatepass"))


def _rename(row: Mapping[str, Any], columns: Mapping[str, str], where: str, first: bool) -> dict[str, Any]:
    """The row under our names; other columns that are called like content go to `meta` as NAME_column."""
    missing = [column for column in columns.values() if column not in row]
    if missing:
        sentence = "; ".join(_no_column(name, row) for name in missing)
        if first:
            raise ConfigError(f"{where}: {sentence}")
        raise BadRow("missing column", sentence)
    taken = set(columns.values())
    kept = {key: value for key, value in row.items() if key not in taken and key not in columns}
    if any(name in CONTENT for name in columns):  # what the content is was said: the rest of it is none
        kept = {f"{key}_column" if key in CONTENT else key: value for key, value in kept.items()}
    return kept | {field: row[column] for field, column in columns.items()}


def _no_column(name: str, row: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, list(row), n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"there is no column {name}; the columns are {', '.join(row) or 'none'}{hint}"


def _check_form(row: Mapping[str, Any], unfinished: bool = False) -> None:
    forms = [form for form in FORMS if form in row]
    if unfinished and not forms and ("prompt" in row or _has_other_columns(row)):
        return
    if not forms and "prompt" in row:
        raise BadRow("no response", "the row has a prompt and no response; add `response`, or `chosen` and `rejected`")
    if not forms:
        raise BadRow("no content", _no_content(row))
    missing = [name for name in FORMS[forms[0]] if name not in row]
    if missing:
        raise BadRow(f"no {missing[0]}", f"the row has {forms[0]} and no {' and no '.join(missing)}; add it")
    both = [name for name in (*FORMS, "prompt", "rejected") if name in row and name not in FORMS[forms[0]]]
    if both:
        choice = " ".join(f"data.columns.{name}={name}" for name in FORMS[forms[0]])
        raise BadRow("ambiguous", f"the row has both {forms[0]} and {both[0]}; keep one, or say which with {choice}")
    if "teacher_prompt" in row and "prompt" not in row:
        raise BadRow("teacher_prompt", NO_PROMPT)


def _has_other_columns(row: Mapping[str, Any]) -> bool:
    """Whether a row without content says anything at all, and none of it under the name of half a form."""
    return not any(name in row for name in CONTENT) and bool(row.get("meta") or set(row) - set(FIELDS))


def _no_content(row: Mapping[str, Any]) -> str:
    for key in row:
        near = difflib.get_close_matches(str(key), CONTENT, n=1)
        if near:
            return f"the row has no content; its columns are {', '.join(row)}; is data.columns.{near[0]}={key} meant?"
    return (
        f"the row has none of text, messages, prompt + response, prompt + chosen + rejected (its columns are "
        f"{', '.join(map(str, row)) or 'none'}); name the right ones, such as data.columns.prompt=question"
    )


def _check_text(value: Any, name: str, may_be_blank: bool = False) -> None:
    if not isinstance(value, str):
        raise BadRow("wrong type", f"{name} must be text, not {_kind(value)}")
    if not value.strip() and not may_be_blank:
        raise BadRow(f"empty {name.split('.')[-1]}", f"{name} is empty; delete the row or fill it in")
    if "\x00" in value:
        raise BadRow("NUL character", f"{name} has a NUL character at {value.index(chr(0)) + 1}; remove it")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow("lone surrogate", f"{name} has half a character (a lone surrogate) at {error.start + 1}") from None


def _check_messages(messages: Any, unfinished: bool = False) -> None:
    if not isinstance(messages, list) or not messages:
        raise BadRow("wrong type", f'messages must be a list of {{"role", "content"}}, not {_kind(messages)}')
    for number, message in enumerate(messages):
        name = f"messages[{number}]"
        if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
            raise BadRow("wrong type", f'{name} must be an object with "role" and "content"')
        for key, value in message.items():
            _check_text(value, f"{name}.{key}", may_be_blank=message["role"] != "assistant" and key == "content")
    if not unfinished and all(message["role"] != "assistant" for message in messages):
        raise BadRow("no response", "messages have no turn with role assistant, so there is nothing to learn")


def _label(row: Mapping[str, Any], name: str) -> str | None:
    value = row.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise BadRow("wrong type", f"{name} must be a word, not {_kind(value)}")
    return str(value)


def _number(row: Mapping[str, Any], name: str, minimum: float = -math.inf, default: Any = None) -> Any:
    value = row.get(name, default)
    if value is default:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRow("wrong type", f"{name} must be a number, not {_kind(value)}")
    if not -1e300 < value < 1e300 or value < minimum:
        raise BadRow("bad number", f"{name} is {value}; give a finite number{' of at least 0' if minimum == 0 else ''}")
    return float(value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise BadRow("duplicate key", f"the key {twice} stands twice; keep one")
    return row


def _no_constant(name: str) -> float:
    raise BadRow("broken JSON", f"{name} is no JSON; write null or a number")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    if value in ("", [], {}):
        return "empty"
    return names.get(type(value), "null" if value is None else type(value).__name__)
