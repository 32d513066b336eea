"""A data set of the hub, or a local folder of parquet, JSON, CSV or Arrow files, through the library `datasets`."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import xxhash

from kdcli.api import Data, Example
from kdcli.data._options import check_columns, check_domains, check_limit
from kdcli.errors import ConfigError
from kdcli.store import paths
from kdcli.store.examples import BadRow, BadRows, parse_example

BLOCK = 1000  # rows hashed at a time


class Hub(Data):
    """`path` is a hub id or a folder, `name` its configuration, `split` such as train or train[:10%], `revision` a
    commit, tag or branch. A row belongs to `domain`; where that is not set, to its column `domain`, else to the one
    called like the last part of `path`. The other settings are those of `jsonl`. Never runs the data set's own code.

    Raises ConfigError when it cannot be loaded, and for bad rows as `jsonl` does; rows are named path[split]:number.
    """

    def __init__(
        self,
        *,
        path: str,
        name: str | None = None,
        split: str = "train",
        revision: str | None = None,
        domain: str | None = None,
        columns: Mapping[str, str] | None = None,
        limit: int | None = None,
        max_bad_fraction: float = 0.0,
    ) -> None:
        self.path = path
        self.name = name
        self.split = split
        self.revision = revision
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
        own = self.domain or Path(self.path).name.split(".")[0]
        column = self.columns.get("domain", "domain")
        named = self.domain is None and column in self._table.column_names
        names = [str(name or own) for name in self._table.unique(column)] if named else [own]
        check_domains(names, self.path)
        return {name: _Rows(name, own, self, unfinished) for name in dict.fromkeys(names)}

    def fingerprint(self) -> str:
        settings = (
            self.domain or Path(self.path).name,
            sorted(self.columns.items()),
            self.limit,
            self.max_bad_fraction,
        )
        return xxhash.xxh3_128_hexdigest(repr((self._content, settings)).encode())

    def bad_rows(self) -> dict[str, str]:
        return dict(self._bad.reasons)

    @cached_property
    def _table(self) -> Any:
        import datasets
        from datasets.exceptions import DatasetsError

        place = paths.resolve(self.path)
        path = str(place) if place.exists() else self.path
        try:
            return datasets.load_dataset(path, self.name, split=self.split, revision=self.revision)
        except (OSError, ValueError, RuntimeError, KeyError, DatasetsError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ConfigError(
                f"{self.path}: the data set cannot be loaded ({type(error).__name__}: {reason}); check data.path, "
                f"data.name, data.split={self.split} and the network"
            ) from error

    @cached_property
    def _content(self) -> str:
        """A hash of the table's columns and values, whatever files they came from."""
        import pyarrow as pa

        digest = xxhash.xxh3_128(repr(sorted(self._table.column_names)).encode())
        for table in self._table.with_format("arrow").iter(BLOCK):
            sink = io.BytesIO()
            table = table.select(sorted(table.column_names)).replace_schema_metadata(None).combine_chunks()
            with pa.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table)
            digest.update(sink.getvalue())
        return digest.hexdigest()


@dataclass(frozen=True)
class _Rows:
    """The rows of one domain, read anew by each iteration."""

    name: str
    own: str
    data: Hub
    unfinished: bool

    def __length_hint__(self) -> int:
        rows = len(self.data._table)
        return min(rows, self.data.limit or rows)

    def __iter__(self) -> Iterator[Example]:
        data, bad, left = self.data, self.data._bad, self.data.limit
        source = f"{data.path}[{data.split}]"
        bad.open(source)
        for number, row in enumerate(data._table):
            bad.rows += 1
            where = f"{source}:{number}"
            try:
                example = parse_example(
                    row,
                    where=where,
                    domain=self.own,
                    columns=data.columns,
                    first=number == 0,
                    unfinished=self.unfinished,
                )
            except BadRow as error:
                bad.add(where, error)
                continue
            if data.domain is None and example.domain != self.name:
                continue
            yield replace(example, domain=self.name)
            left = None if left is None else left - 1
            if left == 0:
                break
        bad.close()
