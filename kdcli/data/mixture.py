"""A mixture of named domains, each from a source of its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from operator import length_hint

import xxhash

from kdcli.api import Data, Example
from kdcli.data._options import check_domains
from kdcli.errors import ConfigError


class Mixture(Data):
    """`domains` gives each domain its data; what a source calls its own domains does not matter here.

    Raises ConfigError when there is no domain, or a name is no word.
    """

    def __init__(self, *, domains: Mapping[str, Data]) -> None:
        if not domains:
            raise ConfigError("data.domains is empty; name at least one domain")
        check_domains(domains, "data.domains")
        self.sources = dict(domains)
        self.max_bad_fraction = max(source.max_bad_fraction for source in self.sources.values())

    def domains(self) -> dict[str, Iterable[Example]]:
        return {name: _Rows(name, source.domains()) for name, source in self.sources.items()}

    def seeds(self) -> dict[str, Iterable[Example]]:
        return {name: _Rows(name, source.seeds()) for name, source in self.sources.items()}

    def fingerprint(self) -> str:
        return xxhash.xxh3_128_hexdigest(
            repr([(name, source.fingerprint()) for name, source in self.sources.items()]).encode()
        )

    def bad_rows(self) -> dict[str, str]:
        return {where: reason for source in self.sources.values() for where, reason in source.bad_rows().items()}


@dataclass(frozen=True)
class _Rows:
    """All rows of a source under one name, read anew by each iteration."""

    name: str
    parts: Mapping[str, Iterable[Example]]

    def __length_hint__(self) -> int:
        return sum(length_hint(part) for part in self.parts.values())

    def __iter__(self) -> Iterator[Example]:
        return (replace(example, domain=self.name) for part in self.parts.values() for example in part)
