"""JSONL files: one example a line; one domain a file, or as the rows say."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import xxhash

from kdcli.api import Data, Example
from kdcli.data._files import file_facts
from kdcli.data._options import check_columns, check_domains, check_limit
from kdcli.errors import ConfigError
from kdcli.store import paths
from kdcli.store.examples import BadRows, read_examples


class Jsonl(Data):
    """Files, globs and folders of JSONL. A row belongs to `domain`; where that is not set, to the domain that it names
    itself, else to the one called like its file. `columns` maps our fields to the file's: {prompt: question}.

    `limit` keeps the first rows of each domain. Up to `max_bad_fraction` of a file's rows may be bad; they are dropped
    and counted. Raises ConfigError naming file and line, DataError when more rows are bad.
    """

    def __init__(
        self,
        *,
        path: str | Sequence[str],
        domain: str | None = None,
        columns: Mapping[str, str] | None = None,
        limit: int | None = None,
        max_bad_fraction: float = 0.0,
    ) -> None:
        self.paths = [path] if isinstance(path, str) else list(path)
        self.domain = domain
        self.columns = check_columns(columns)
        self.limit = check_limit(limit)
        self.max_bad_fraction = max_bad_fraction
        self._bad = BadRows(max_bad_fraction)

    def domains(self) -> dict[str, Iterable[Example]]:
        return self._rows(unfinished=False)

    def seeds(self) -> dict[str, Iterable[Example]]:
        return self._rows(unfinished=True)

    def _rows(self, *, unfinished: bool) -> dict[str, Iterable[Example]]:
        self._bad.reasons.clear()
        return {name: _Rows(name, files, self, self._bad, unfinished) for name, files in self._files().items()}

    def fingerprint(self) -> str:
        content = [
            (name, name_of(file), file_facts(file, self._domain_column).hash)
            for name, files in self._files().items()
            for file in files
        ]
        settings = (self.domain, sorted(self.columns.items()), self.limit)
        return xxhash.xxh3_128_hexdigest(repr((content, settings)).encode())

    def bad_rows(self) -> dict[str, str]:
        return dict(self._bad.reasons)

    def files(self) -> list[Path]:
        """All files that are read, each once."""
        return list(dict.fromkeys(file for files in self._files().values() for file in files))

    @property
    def _domain_column(self) -> str:
        return self.columns.get("domain", "domain")

    def _files(self) -> dict[str, dict[Path, int]]:
        """Domain -> file -> rows of it there. Raises ConfigError where a path names nothing or a file is empty."""
        domains: dict[str, dict[Path, int]] = {}
        for file in dict.fromkeys(file for path in self.paths for file in _expand(path)):
            counts = file_facts(file, self._domain_column).domains
            if not counts:
                raise ConfigError(f"{file}: the file has no rows; take it out of data.path")
            for name, count in counts.items():
                files = domains.setdefault(self.domain or name or name_of(file), {})
                files[file] = files.get(file, 0) + count
        check_domains(domains, self.paths[0])
        return domains


@dataclass(frozen=True)
class _Rows:
    """The rows of one domain, read anew by each iteration."""

    name: str
    files: Mapping[Path, int]
    data: Jsonl
    bad: BadRows
    unfinished: bool

    def __length_hint__(self) -> int:
        rows = sum(self.files.values())
        return min(rows, self.data.limit or rows)

    def __iter__(self) -> Iterator[Example]:
        left = self.data.limit
        for file in self.files:
            for example in read_examples(
                file, domain=name_of(file), columns=self.data.columns, bad=self.bad, unfinished=self.unfinished
            ):
                if self.data.domain is None and example.domain != self.name:
                    continue
                yield example if example.domain == self.name else replace(example, domain=self.name)
                left = None if left is None else left - 1
                if left == 0:
                    return self.bad.close()


def name_of(file: Path) -> str:
    """The domain called like a file: `data/code.train.jsonl` -> `code`."""
    return file.name.split(".")[0]


def _expand(path: str) -> list[Path]:
    """The files that a path, a folder or a glob means, sorted."""
    place = paths.resolve(path)
    if place.is_dir():
        files = sorted(place.glob("*.jsonl"))
        if not files:
            raise ConfigError(f"{path}: the folder has no .jsonl files; data=hub reads other formats")
        return files
    if place.exists():
        return [place]
    files = sorted(Path(name) for name in glob.glob(str(place), recursive=True) if Path(name).is_file())
    if not files:
        raise ConfigError(f"{path}: there is no such file or folder ({place.absolute()}); check data.path")
    return files
