"""Rows of each domain that are not trained on, in micro-batches dealt to the ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import overload

import torch
import xxhash

from kdcli.api import Batch
from kdcli.errors import ConfigError
from kdcli.store.tokens import Row
from kdcli.text.collate import collate

SHARE = 10  # at most one row in so many is taken from training


class Part(Sequence[Row]):
    """Rows `start` to `stop` of a domain, read when they are asked for."""

    def __init__(self, rows: Sequence[Row], start: int, stop: int) -> None:
        self.rows, self.places = rows, range(start, stop)

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self.rows[place] for place in self.places[index]]
        return self.rows[self.places[index]]


def hold_out(rows: Mapping[str, Sequence[Row]], count: int) -> tuple[dict[str, Part], dict[str, Part]]:
    """Each domain's training rows, and its last `count` (at most a tenth, at least one), which are held out.

    Raises ConfigError for a domain of a single row.
    """
    alone = [name for name, own in rows.items() if len(own) < 2]
    if alone:
        raise ConfigError(
            f"domain {alone[0]} has {len(rows[alone[0]])} row, and one would be held out of training for the probe; "
            "give it more rows, or held-out ones of their own: data@probe.data=jsonl probe.data.path=…"
        )
    cuts = {name: len(own) - min(count, max(1, len(own) // SHARE)) for name, own in rows.items()}
    return (
        {name: Part(own, 0, cuts[name]) for name, own in rows.items()},
        {name: Part(own, cuts[name], len(own)) for name, own in rows.items()},
    )


def first_rows(rows: Mapping[str, Sequence[Row]], count: int, domains: Sequence[str]) -> dict[str, Part]:
    """The first `count` rows of each of `domains`, from data of their own. Raises ConfigError for one without any."""
    missing = [name for name in domains if not len(rows.get(name, ()))]
    if missing:
        raise ConfigError(
            f"domain {missing[0]} has no held-out rows: probe.data has {', '.join(rows)}; add them, or set "
            "probe.data=null to hold out some of the training rows"
        )
    return {name: Part(rows[name], 0, min(count, len(rows[name]))) for name in domains}


class HeldOut:
    """Micro-batches of held-out rows, the longest first, cut the same way for any number of ranks and dealt in turn."""

    def __init__(
        self, rows: Mapping[str, Sequence[Row]], *, micro_size: int, pad_id: int, rank: int, world_size: int
    ) -> None:
        self.rows = dict(rows)
        self.micro_size, self.pad_id = micro_size, pad_id
        self.rank, self.world_size = rank, world_size

    def batches(self, domain: str | None = None) -> Iterator[Batch]:
        """This rank's micro-batches, of all domains or one; as many on every rank, the last perhaps without a target.
        The worse answer of a pair has none."""
        places = [place for place in self._places if domain in (None, place[0])]
        micro = [places[start : start + self.micro_size] for start in range(0, len(places), self.micro_size)]
        for turn in range(self.rank, self.rank + len(micro), self.world_size):
            batch = collate([self.rows[name][row] for name, row in micro[turn % len(micro)]], pad_id=self.pad_id)
            if batch.rejected is not None:
                batch = replace(batch, mask=batch.mask & ~batch.rejected[batch.segment.clamp(min=0)])
            yield batch if turn < len(micro) else replace(batch, mask=torch.zeros_like(batch.mask))

    @cached_property
    def digest(self) -> str:
        """A hash of which rows they are."""
        return xxhash.xxh3_128_hexdigest(repr(sorted(self.content.items())).encode())

    @cached_property
    def content(self) -> dict[str, str]:
        """A hash of the rows of each domain."""
        return {name: _hash(own) for name, own in self.rows.items()}

    @cached_property
    def _places(self) -> list[tuple[str, int]]:
        """(domain, row) of all rows, the longest first."""
        places = [(name, row) for name, own in self.rows.items() for row in range(len(own))]
        return sorted(places, key=lambda place: -len(self.rows[place[0]][place[1]]))


def _hash(rows: Sequence[Row]) -> str:
    digest = xxhash.xxh3_128()
    for row in rows:
        for segment in row.segments:
            digest.update(f"{segment.key} {len(segment)} ".encode())
            digest.update(segment.ids.tobytes())
    return digest.hexdigest()
