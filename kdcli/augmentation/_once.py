"""What is dear to compute is computed once: within a block, within a run, and in later runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import xxhash

from kdcli.api import Desk

T = TypeVar("T")


def once(desk: Desk, kind: str, things: Sequence[T], compute: Callable[[Sequence[T]], Sequence[Any]]) -> list[Any]:
    """A JSON value for each thing; `compute` gets those that are not stored under `kind`, equal ones as one. Things are
    told apart by their `repr`."""
    keys = [xxhash.xxh3_128_hexdigest(repr(thing).encode("utf-8", "replace")) for thing in things]
    different = dict(zip(keys, things, strict=True))
    own, chosen = list(different), list(different.values())
    values = desk.remember(kind, own, lambda missing: compute([chosen[place] for place in missing]))
    known = dict(zip(own, values, strict=True))
    return [known[key] for key in keys]
