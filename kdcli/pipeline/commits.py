"""The files of a step: written beside, flushed, renamed, and sealed by COMMIT.json, which says what they are of."""

from __future__ import annotations

import json
import logging
import os
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from kdcli.api import Example
from kdcli.store import atomic
from kdcli.store.content import file_hash
from kdcli.store.examples import BadRow, load_example, parse_example

log = logging.getLogger(__name__)

ROWS, ASIDE, COMMIT = "rows.jsonl", "aside.jsonl", "COMMIT.json"
RUN = ".run"  # holds the name under which the store knows what a run folder spent


@dataclass(frozen=True, kw_only=True)
class Commit:
    """What COMMIT.json says. All of it follows from the rows, so it is the same however often the run was killed."""

    key: str  # of all that decides the step's files
    rows_in: int = 0
    rows: int = 0
    rows_hash: str = ""
    aside: dict[str, int] = field(default_factory=dict)  # reason -> rows
    aside_hash: str = ""
    asked: int = 0  # questions to writers
    failed: int = 0
    forms: dict[str, int] = field(default_factory=dict)  # Example.kind -> rows
    unreadable: dict[str, int] = field(default_factory=dict)  # reason for which `distill` would refuse a row -> rows

    def write(self, folder: Path) -> None:
        atomic.write_json(folder / COMMIT, asdict(self))

    @classmethod
    def read(cls, folder: Path, key: str) -> Commit | None:
        """The commit of a folder if it has this key and the files are as they were written."""
        try:
            known = cls(**json.loads((folder / COMMIT).read_bytes()))
            if known.key != key:
                return None
            same = (file_hash(folder / ROWS), file_hash(folder / ASIDE)) == (known.rows_hash, known.aside_hash)
        except (OSError, ValueError, TypeError):  # absent or not ours: done anew
            return None
        if not same:
            log.warning("%s: its files are not as they were written; this step is done anew", folder)
        return known if same else None


class Lines:
    """A file of lines that appears under its name when it is whole. `hash` and `count` are of what was written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.count = 0
        self._beside = path.with_name(f".{path.name}.tmp")
        self._digest = xxhash.xxh3_128()
        self._file: BinaryIO = open(self._beside, "wb", buffering=2**18)  # noqa: SIM115

    def add(self, line: bytes) -> None:
        self._file.write(line)
        self._digest.update(line)
        self.count += 1

    @property
    def hash(self) -> str:
        return self._digest.hexdigest()

    def end(self) -> None:
        """Flush to disk and rename; the folder is flushed by whoever writes the commit."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._beside, self.path)

    def drop(self) -> None:
        """Forget it, where the run ends before the step does."""
        with suppress(OSError):  # what was buffered may find no room
            self._file.close()
        self._beside.unlink(missing_ok=True)


def read_rows(path: Path) -> Iterator[Example]:
    """The rows of a step's file, in order."""
    with open(path, "rb", buffering=2**18) as file:
        for number, line in enumerate(file, start=1):
            yield load_example(line, where=f"{path}:{number}")


def aside_line(step: str, reason: str, detail: str, text: str, row: bytes) -> bytes:
    """One line of aside.jsonl with a row as `dump_example` writes it; what is empty is left out."""
    told = {k: v for k, v in {"step": step, "reason": reason, "detail": detail, "text": text}.items() if v}
    try:
        start = json.dumps(told, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # half a character
        start = json.dumps(told).encode()
    return start[:-1] + b', "row": ' + row.rstrip() + b"}\n"


class Quality:
    """Counts what rows are, and what of them `distill` would refuse."""

    def __init__(self) -> None:
        self.forms: Counter[str] = Counter()
        self.unreadable: Counter[str] = Counter()

    def add(self, example: Example) -> None:
        self.forms[example.kind] += 1
        if _is_plain(example):  # what most rows are; spares a second look
            return
        try:
            parse_example({name: value for name, value in vars(example).items() if name != "where"})
        except BadRow as error:
            self.unreadable[error.reason] += 1


def _is_plain(example: Example) -> bool:
    """Whether it is a prompt and a response in ASCII, and so certainly readable."""
    if (example.text, example.messages, example.chosen, example.rejected, example.teacher_prompt) != (None,) * 5:
        return False
    return all(
        text is not None and text.isascii() and "\x00" not in text and text != "" and not text.isspace()
        for text in (example.prompt, example.response)
    )


def join(paths: Iterable[Path], target: Path) -> None:
    """Write files one after the other as `target`, unless it is that already."""
    paths = list(paths)
    digest = xxhash.xxh3_128()
    for block in _blocks(paths):
        digest.update(block)
    try:
        if file_hash(target) == digest.hexdigest():
            return
    except OSError:
        pass
    lines = Lines(target)
    try:
        for block in _blocks(paths):
            lines.add(block)
        lines.end()
    except BaseException:
        lines.drop()
        raise
    atomic.fsync_folder(target.parent)


def _blocks(paths: Iterable[Path]) -> Iterator[bytes]:
    return chain.from_iterable(_of_file(path) for path in paths)


def _of_file(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while block := file.read(2**22):
            yield block


def hashed(facts: Any) -> str:
    """A hash of JSON."""
    text = json.dumps(facts, sort_keys=True, default=str, separators=(",", ":"))
    return blake2b(text.encode(), digest_size=16).hexdigest()


def run_id(folder: Path, *, make: bool) -> str | None:
    """The name under which the store knows what a run folder spent; None where there is none and none is made."""
    file = folder / RUN
    if not file.exists():
        if not make:
            return None
        for torn in folder.glob(f".{RUN}.*.tmp"):  # of a start that was killed
            torn.unlink()
        atomic.write_text(file, uuid.uuid4().hex + "\n")
    return file.read_text().strip()
