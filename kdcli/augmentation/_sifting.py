"""What filters share: rows pass, or are set aside with a reason that is counted."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator

from kdcli.api import Example, Transform


class Filter(Transform):
    """Keeps rows for which `reason` finds nothing. A rehearsal keeps all, since what it sees are no answers."""

    def __call__(self, examples: Iterable[Example]) -> Iterator[Example]:
        for example in examples:
            found = None if self.desk.rehearsal else self.reason(example)
            if found is None:
                yield example
            else:
                self.desk.aside(example, *found)

    @abstractmethod
    def reason(self, example: Example) -> tuple[str, str] | None:
        """Why a row is not kept: a short reason to count by and a sentence; None keeps it."""
