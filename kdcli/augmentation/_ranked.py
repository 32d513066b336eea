"""What steps share that give each row a number and keep rows by it: bounds, or the share with the largest numbers."""

from __future__ import annotations

from abc import abstractmethod
from array import array
from collections.abc import Iterable, Iterator, Sequence

from kdcli.api import Example, Transform
from kdcli.augmentation._asking import blocks
from kdcli.augmentation._sifting import Spool
from kdcli.errors import ConfigError

BLOCK = 256  # rows that are scored at a time


class Ranked(Transform):
    """`numbers` scores a block. Rows pass in their order; `top_share` of those within bounds is kept: at least one,
    the earlier of equal ones. It needs all numbers, so rows wait in a file of the step's folder: their numbers alone
    are in memory. A rehearsal scores nothing and keeps all.
    """

    def __init__(self, *, where: str, top_share: float | None, lowest: bool) -> None:
        if top_share is not None and not 0.0 < top_share <= 1.0:
            raise ConfigError(f"{where}.top_share: is {top_share}; give a share above 0 up to 1, or null")
        self.top_share = top_share
        self.lowest = lowest

    @abstractmethod
    def numbers(self, block: Sequence[Example]) -> Sequence[float | tuple[str, str]]:
        """A number for each row, or why it has none: a short reason and a sentence."""

    @abstractmethod
    def outside(self, example: Example, number: float) -> tuple[str, str] | None:
        """Why a row is out of bounds: a short reason and a sentence; None keeps it."""

    @abstractmethod
    def marked(self, example: Example, number: float) -> Example:
        """The row with its number."""

    def __call__(self, examples: Iterable[Example]) -> Iterator[Example]:
        if self.desk.rehearsal:
            yield from (self.marked(example, 0.0) for example in examples)
        elif self.top_share is None:
            yield from (example for example, _ in self._within(examples))
        else:
            yield from self._top(examples)

    def _within(self, examples: Iterable[Example]) -> Iterator[tuple[Example, float]]:
        for block in blocks(examples, BLOCK):
            for example, number in zip(block, self.numbers(block), strict=True):
                found = number if isinstance(number, tuple) else self.outside(example, number)
                if found is not None:
                    self.desk.aside(example, *found)
                elif not isinstance(number, tuple):
                    yield self.marked(example, number), number

    def _top(self, examples: Iterable[Example]) -> Iterator[Example]:
        assert self.top_share is not None
        spool, found = Spool(self.desk.folder), array("d")

        def rows() -> Iterator[Example]:
            for example, number in self._within(examples):
                found.append(number if self.lowest else -number)
                yield example

        for _ in spool.fill(rows()):
            pass
        count = max(1, int(self.top_share * len(found) + 1e-9))
        order = sorted(range(len(found)), key=found.__getitem__)  # stable: of equal ones the earlier first
        kept = bytearray(len(found))
        for place in order[:count]:
            kept[place] = 1
        for place, example in enumerate(spool):
            if kept[place]:
                yield example
            else:
                self.desk.aside(example, "below the top", f"not of the {self.top_share:g} that are kept")
        spool.remove()


def number_of(value: object) -> float | None:
    """A JSON value as a number: true is 1. None for anything else."""
    return float(value) if isinstance(value, bool | int | float) else None
