"""What a run must know of a file of examples before it reads it: a hash of its bytes, and the domains its rows name."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import xxhash

from kdcli.errors import ConfigError
from kdcli.store import atomic, paths
from kdcli.store.content import file_hash
from kdcli.store.examples import BadRow, parse_line, read_lines


@dataclass(frozen=True)
class FileFacts:
    """`hash` of the bytes; `domains`: what rows name as theirs ("" where nothing) -> rows, in order of appearance."""

    hash: str
    domains: dict[str, int]


def file_facts(path: Path, column: str = "domain") -> FileFacts:
    """Two quick passes over the file, remembered in the cache until its size, time or inode changes.

    `column` is the field that names the domain. Raises ConfigError when the file cannot be read.
    """
    try:
        status = path.stat()
        identity = (str(path.resolve()), column, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        note = paths.cache() / "files" / f"{xxhash.xxh3_128_hexdigest(repr(identity).encode())}.json"
        try:
            known = json.loads(note.read_bytes())
            return FileFacts(known["hash"], dict(known["domains"]))
        except (OSError, ValueError, KeyError, TypeError):  # absent, or not ours: look again
            facts = FileFacts(file_hash(path), _domains(path, column))
            note.parent.mkdir(exist_ok=True, mode=0o700)
            atomic.write_json(note, asdict(facts))
            return facts
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error}); check data.path") from error


def _domains(path: Path, column: str) -> dict[str, int]:
    mark = json.dumps(column).encode()
    rows: dict[str, int] = {}
    for _, line in read_lines(path):
        name = ""
        if mark in line:  # spares the parsing of most files; the row itself says what it names
            try:
                name = str(parse_line(line).get(column) or "")
            except BadRow:
                name = ""
        rows[name] = rows.get(name, 0) + 1
    return rows
