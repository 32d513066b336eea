"""The licence gate: rows whose licence, or whose writer's terms, conflict with the declared use. No legal advice."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

from kdcli.api import Desk, Example
from kdcli.augmentation._sifting import Filter
from kdcli.errors import ConfigError, DataError
from kdcli.store import terms
from kdcli.store.terms import Terms


class Licence(Filter):
    """Sets rows aside (or stops the run) where the table of terms says no to `use`.

    A row's terms are those of its `meta.license` and of each entry of `meta.written`. Rows are looked at one by one,
    whatever their group. The table, configs/terms.yaml, helps to keep records and is no legal advice.
    """

    def __init__(
        self,
        *,
        use: Literal["research", "commercial", "competing"] = "research",
        on_conflict: Literal["drop", "stop"] = "drop",
        on_unknown: Literal["keep", "drop", "stop"] = "keep",
        acknowledged: Sequence[str] = (),
    ) -> None:
        if use not in terms.USES:
            raise ConfigError(f"augmentation: licence.use is {use}; declare one of {', '.join(terms.USES)}")
        for name in acknowledged:
            terms.terms_of(given=name)
        self.use = use
        self.on_conflict = on_conflict
        self.on_unknown = on_unknown
        self.acknowledged = frozenset(acknowledged)

    def open(self, desk: Desk) -> None:
        super().open(desk)
        terms.fingerprint()  # a broken table ends the run here
        self._of = lru_cache(maxsize=4096)(_found)  # few licences and writers make many rows

    def fingerprint(self) -> str:
        return terms.fingerprint()

    def reason(self, example: Example) -> tuple[str, str] | None:
        found = self._of(_stated(example))
        if problems := terms.conflicts(self.use, self.acknowledged, found):
            if self.on_conflict == "stop":
                raise DataError(*problems)
            return "conflict of terms", problems[0]
        unknown = [one for one in found if one[2].id == "unknown" or "unknown" in one[2].id.split("+")]
        if not unknown or self.on_unknown == "keep" or "unknown" in self.acknowledged:
            return None
        kind, name, _ = unknown[0]
        sentence = (
            f"the terms of {kind} {name} are not known; state meta.license or writer.license, add a row to "
            f"./configs/terms.yaml, or set on_unknown=keep; {terms.NO_ADVICE}"
        )
        if self.on_unknown == "stop":
            raise DataError(sentence)
        return "unknown terms", sentence


def _stated(example: Example) -> str:
    """What a row says of its licences and writers, as JSON."""
    licence = example.meta.get("license")
    written = [
        {key: str(entry[key]) for key in ("teacher", "endpoint", "terms") if entry.get(key)}
        for entry in example.meta.get("written", ())
    ]
    source = str(example.meta.get("source") or "of the user")
    return json.dumps([source, licence, written], ensure_ascii=False, default=str)


def _found(stated: str) -> list[tuple[str, str, Terms]]:
    """(kind, name, terms) of each source and writer of a row. What a writer made of nothing has no other source."""
    source, licence, written = json.loads(stated)
    found: list[tuple[str, str, Terms]] = []
    if licence or not written:
        found.append(("data", source, terms.terms_of(license=licence)))
    for entry in written:
        try:
            known = terms.terms_of(endpoint=entry.get("endpoint"), model=entry.get("teacher"), given=entry.get("terms"))
        except ConfigError:  # rows of another project name rows of another table
            known = terms.UNKNOWN
        found.append(("teacher", entry.get("teacher", "unnamed"), known))
    return list(dict.fromkeys(found))
