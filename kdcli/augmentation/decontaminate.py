"""Decontamination by n-gram overlap with evaluation sets: Brown et al. 2020 (GPT-3), arXiv:2005.14165, App. C."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from kdcli.api import Desk, Example
from kdcli.augmentation._sifting import Field, Filter, lacking, text_of, words
from kdcli.errors import ConfigError
from kdcli.store import paths
from kdcli.store.content import file_hash
from kdcli.store.examples import CONTENT, BadRow, parse_line, read_lines

SHORT = 8  # words of the n-grams of items with fewer than n words; GPT-3's least n
COMMON = 10  # an n-gram of more items is boilerplate; GPT-3 leaves out those that its training text has so often
ASKS = ("prompt", "text", "messages", "question", "instruction", "problem", "query", "input")  # what an item asks


class Decontaminate(Filter):
    """Sets rows aside that share n words in a row with an item of an evaluation set.

    Texts of an item of fewer than `n` words are looked for by 8 words in a row. Of fewer than 8, such as answers, they
    are not looked for, but for what the item asks: a row whose prompt is just that is set aside. An n-gram that stands
    in more than 10 items is passed over, unless its item has no other. Rows are looked at one by one, whatever their
    group: a contaminated prompt takes all its answers with it, a contaminated answer only itself. Memory holds 12
    bytes for each n-gram of the evaluation sets, and about 200 while they are read.
    """

    def __init__(self, *, against: Sequence[str], n: int = 13, field: Field = "all") -> None:
        if not against:
            raise ConfigError("augmentation: decontaminate.against is empty; name files of evaluation sets")
        if n < SHORT:
            raise ConfigError(f"augmentation: decontaminate.n is {n}; give {SHORT} or more words")
        self.against = list(against)
        self.n = n
        self.field: Field = field

    def open(self, desk: Desk) -> None:
        super().open(desk)
        if not desk.rehearsal:
            self._read()

    def fingerprint(self) -> str:
        return " ".join(file_hash(file) for file in self.files().values())

    def files(self) -> dict[str, Path]:
        """The evaluation sets' files by the names they are told by; of a folder all .jsonl and .txt. Raises ConfigError
        where there is none."""
        found: dict[str, Path] = {}
        for name in self.against:
            path = paths.resolve(name)
            inside = sorted(f for f in path.rglob("*") if f.suffix in (".jsonl", ".txt")) if path.is_dir() else [path]
            if not inside or not all(file.is_file() for file in inside):
                raise ConfigError(
                    f"augmentation: decontaminate.against: {name} is no file, nor a folder of .jsonl files"
                )
            for file in inside:
                found[name if file == path else f"{name.rstrip('/')}/{file.relative_to(path).as_posix()}"] = file
        return found

    def reason(self, example: Example) -> tuple[str, str] | None:
        text = text_of(example, self.field)
        if text is None:
            return lacking(self.field)
        found = words(text)
        for size in dict.fromkeys((self.n, SHORT)):
            if (place := self._place(list(_ngrams(found, size)))) is not None:
                return "contaminated", f"{self.field} shares {size} words in a row with {place}"
        asks = words((text_of(example, "prompt") or example.text or "") if self.field != "response" else "")
        if 0 < len(asks) < SHORT and (place := self._place([_key(asks, 0)])) is not None:
            return "contaminated", f"the row asks just what {place} asks"
        return None

    def _read(self) -> None:
        files = self.files()
        counts: Counter[int] = Counter()
        for _, item in _items(files):
            counts.update(self._keys(item))
        first: dict[int, int] = {}
        self._places: list[str] = []
        for place, item in _items(files):
            keys = self._keys(item)
            for key in {key for key in keys if counts[key] <= COMMON} or keys:
                first.setdefault(key, len(self._places))
            self._places.append(place)
        if not first:
            raise ConfigError(f"augmentation: decontaminate.against: {', '.join(self.against)} hold no text")
        order = sorted(first)
        self._hashes = np.array(order, dtype=np.uint64)
        self._numbers = np.array([first[key] for key in order], dtype=np.uint32)

    def _keys(self, item: Mapping[str, Any]) -> set[int]:
        """What an item is looked for by."""
        keys: set[int] = set()
        for text in _texts(item):
            found = words(text)
            keys.update(_ngrams(found, self.n if len(found) >= self.n else SHORT))
        asks = words(next(_texts([item[name] for name in ASKS if item.get(name)]), ""))
        return keys | {_key(asks, 0)} if 0 < len(asks) < SHORT else keys

    def _place(self, keys: Sequence[int]) -> str | None:
        """file:line of the item of the first key that one has."""
        wanted = np.array(keys, dtype=np.uint64)
        at = np.minimum(np.searchsorted(self._hashes, wanted), len(self._hashes) - 1)
        hits = np.flatnonzero(self._hashes[at] == wanted)
        return self._places[int(self._numbers[at[hits[0]]])] if len(hits) else None


def _ngrams(found: Sequence[str], size: int) -> Iterator[int]:
    for start in range(len(found) - size + 1):
        yield _key(found[start : start + size], size)


def _key(part: Sequence[str], size: int) -> int:
    """A hash of words in a row; `size` 0 stands for a whole text, so that it differs from any n-gram."""
    return xxhash.xxh3_64_intdigest(" ".join(part).encode(), seed=size)


def _items(files: Mapping[str, Path]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file:line, columns) of each item: the content fields of a row, or all its columns where it has none of them."""
    for name, file in files.items():
        for place, line in read_lines(file):
            if not line.strip():
                continue
            where = f"{name}:{place.rpartition(':')[2]}"
            if file.suffix == ".txt":
                yield where, {"text": line.decode("utf-8", "replace")}
                continue
            try:
                row = parse_line(line)
            except BadRow as error:
                raise ConfigError(f"{where}: {error}") from None
            yield where, {name: row[name] for name in CONTENT if row.get(name) is not None} or row


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, one in value.items():
            if key != "role":
                yield from _texts(one)
    elif isinstance(value, list):
        for one in value:
            yield from _texts(one)
