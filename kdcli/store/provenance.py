"""What the rows of a file say of where they come from: sources, licences, and who wrote them (`meta.written`)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from kdcli.errors import ConfigError
from kdcli.store import atomic, paths, terms
from kdcli.store.examples import BadRow, parse_line, read_lines

MARKS = (b'"source"', b'"license"', b'"written"')  # a line without any of them says nothing
WRITTEN = ("teacher", "endpoint", "terms", "by", "step", "template")
UNSTATED = "unstated"


@dataclass
class Summary:
    """Counts of rows. `written`: [{teacher, endpoint, terms, by, step, template, rows}]."""

    rows: int = 0
    prompts: int = 0  # rows with a prompt and neither a response nor a pair
    sources: dict[str, int] = field(default_factory=dict)
    licences: dict[str, int] = field(default_factory=dict)
    written: list[dict[str, Any]] = field(default_factory=list)

    @property
    def says_something(self) -> bool:
        """Whether any row names a licence or a writer."""
        return bool(self.written) or any(name != UNSTATED for name in self.licences)


def of_file(path: Path) -> Summary:
    """The summary of a JSONL file, remembered in the cache until the file changes. Raises ConfigError."""
    try:
        known = path.stat()
        identity = ("written", str(path.resolve()), known.st_ino, known.st_size, known.st_mtime_ns, known.st_ctime_ns)
        note = paths.cache() / "files" / f"{xxhash.xxh3_128_hexdigest(repr(identity).encode())}.json"
        try:
            return Summary(**json.loads(note.read_bytes()))
        except (OSError, ValueError, TypeError):  # absent, or not ours: look again
            found = _read(path)
            note.parent.mkdir(exist_ok=True, mode=0o700)
            atomic.write_json(note, asdict(found))
            return found
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error}); check data.path") from error


def joined(summaries: Iterable[Summary]) -> Summary:
    """One summary of several files."""
    whole, sources, licences, written = Summary(), Counter(), Counter(), Counter()
    for one in summaries:
        whole.rows += one.rows
        whole.prompts += one.prompts
        sources.update(one.sources)
        licences.update(one.licences)
        for entry in one.written:
            written[tuple(entry[key] for key in WRITTEN)] += entry["rows"]
    return _filled(whole, sources, licences, written)


def terms_in(summary: Summary) -> Iterator[tuple[str, str, terms.Terms]]:
    """(teacher | data, name, terms) of each writer and licence that rows name, for `kdcli.store.terms.conflicts`."""
    for name in summary.licences:
        if name != UNSTATED:
            yield "data", f"of licence {name}", terms.terms_of(name.split(" + "))
    for entry in summary.written:
        who = f"{entry['teacher'] or 'unknown'} at {entry['endpoint'] or 'an unknown place'}"
        yield "teacher", who, terms_of_entry(entry)


def described(summary: Summary, prompts: Mapping[str, str] | None = None) -> dict[str, Any]:
    """For manifests: the summary, each writer with its row of the table of terms, and the names of prompts by hash."""
    written = [
        {**one, "prompt": (prompts or {}).get(one["template"], ""), "terms_row": terms_of_entry(one).record()}
        for one in summary.written
    ]
    return {"rows": summary.rows, "sources": summary.sources, "licences": summary.licences, "written": written}


def terms_of_entry(entry: Mapping[str, Any]) -> terms.Terms:
    """Of one entry of `meta.written`: by its tag, as far as the table here has its rows, else by teacher and place."""
    parts = [part for part in str(entry.get("terms") or "").split("+") if part]
    found = []
    for part in parts:
        try:
            found.append(terms.UNKNOWN if part == terms.UNKNOWN.id else terms.terms_of(given=part))
        except ConfigError:  # of another user's table
            found.append(terms.UNKNOWN)
    if found and set(found) != {terms.UNKNOWN}:
        return terms.joined(found)
    return terms.terms_of(None, entry.get("endpoint") or None, entry.get("teacher") or None)


def _read(path: Path) -> Summary:
    whole, sources, licences, written = Summary(), Counter(), Counter(), Counter()
    for _, line in read_lines(path):
        whole.rows += 1
        row: Mapping[str, Any] = {}
        if any(mark in line for mark in MARKS) or (b'"prompt"' in line and b'"response"' not in line):
            try:
                row = parse_line(line)
            except BadRow:  # told by whoever reads the rows to learn from them
                row = {}
        meta = row.get("meta") if isinstance(row.get("meta"), Mapping) else {}
        of_row = {**row, **meta}  # type: ignore[dict-item]
        sources[_name(of_row.get("source"))] += 1
        licences[_name(of_row.get("license"))] += 1
        if row.get("prompt") is not None and row.get("response") is None and row.get("chosen") is None:
            whole.prompts += 1
        entries = of_row.get("written")
        for entry in entries if isinstance(entries, list) else []:
            if isinstance(entry, Mapping):
                written[tuple(str(entry.get(key) or "") for key in WRITTEN)] += 1
    return _filled(whole, sources, licences, written)


def _filled(whole: Summary, sources: Counter[str], licences: Counter[str], written: Counter[Any]) -> Summary:
    whole.sources, whole.licences = dict(sorted(sources.items())), dict(sorted(licences.items()))
    whole.written = [dict(zip(WRITTEN, key, strict=True)) | {"rows": n} for key, n in sorted(written.items())]
    return whole


def _name(value: Any) -> str:
    """A licence or source as rows give it: a text, or several."""
    if isinstance(value, list):
        return " + ".join(map(str, value)) or UNSTATED
    return str(value) if value else UNSTATED
