"""The desk of a step: questions answered in order, rows set aside, seeds, memory and provenance."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from json import dumps
from pathlib import Path
from typing import Any, TypeVar

from kdcli.api import Answer, Example, Request
from kdcli.errors import ConfigError, DataError
from kdcli.pipeline.office import Call, Office
from kdcli.store.responses import Account

T = TypeVar("T")
WINDOW = 1024  # questions read ahead; no setting, since the order of what is set aside depends on it
TOGETHER = 32  # questions that are looked up in the store at once
FEW = 20  # failed calls before a run ends in the middle of a step

Aside = Callable[[Example, str, str, str], None]


@dataclass
class Counts:
    """What a step did at its desk so far."""

    asked: int = 0
    answered: int = 0  # of those asked; some hundreds are read ahead
    stored: int = 0
    failed: int = 0


class RunDesk:
    """A `kdcli.api.Desk`. `aside` takes rows out of the stream, `tick` is called while a step waits and may raise."""

    rehearsal = False

    def __init__(
        self,
        step: str,
        *,
        folder: Path,
        seed: int,
        office: Office,
        account: Callable[[str], Account],
        aside: Aside,
        tick: Callable[[], None],
        max_failed_fraction: float,
    ) -> None:
        self.step = step
        self.folder = folder
        self.counts = Counts()
        self._seed = seed
        self._office = office
        self._account = account
        self._aside = aside
        self._tick = tick
        self._max_failed = max_failed_fraction
        self._reasons: Counter[str] = Counter()

    def ask(self, writer: str, questions: Iterable[tuple[T, Request]]) -> Iterator[tuple[T, Answer]]:
        """Reads `WINDOW` questions, and less than `TOGETHER` more, ahead of the answer that it gives, always: so steps
        meet rows in the same order whether answers are quick, slow or stored. New calls go out in the order of the
        questions, `writer.batch` together, so that a restart forms the batches that were left."""
        if writer not in self._office.staff:
            raise ConfigError(f"augmentation.{self.step}: asks the writer {writer}, and there is none of that name")
        waiting: deque[tuple[T, Call]] = deque()
        batch: dict[bytes, Call] = {}  # by key: not made yet
        account, size = self._account(writer), self._office.staff[writer].writer.batch

        def send() -> None:
            if batch:
                self._office.make(writer, tuple(batch.values()), account)
                batch.clear()

        first = 0  # number of the question that `batch` begins with
        try:
            for number, (thing, found) in enumerate(self._looked_up(writer, questions)):
                self._office.check()
                call = self._office.current(found)
                if call.key in batch:
                    call = batch[call.key]
                    call.wanted += 1
                    self.counts.stored += 1
                elif self._office.is_new(call):
                    first = first if batch else number
                    batch[call.key] = call
                else:
                    self.counts.stored += 1
                self.counts.asked += 1
                waiting.append((thing, call))
                if len(batch) >= size or (batch and number - first == WINDOW - 1):
                    send()
                if len(waiting) == WINDOW:
                    yield self._next(writer, waiting)
            send()
            while waiting:
                yield self._next(writer, waiting)
        finally:  # a step may have enough before it has all
            self._office.leave(call for _, call in waiting)

    def aside(self, example: Example, reason: str, detail: str = "", text: str = "") -> None:
        self._aside(example, reason, detail, text)

    def seed(self, *parts: str | int) -> int:
        return seed_of(self._seed, self.step, *parts)

    def remember(self, kind: str, keys: Sequence[str], compute: Callable[[Sequence[int]], Sequence[Any]]) -> list[Any]:
        store = self._office.store
        found = store.recall(kind, keys)
        missing = list({key: index for index, key in reversed(list(enumerate(keys))) if key not in found}.values())
        missing.sort()
        if missing:
            values = dict(zip((keys[index] for index in missing), compute(missing), strict=True))
            store.remember(kind, values)
            found |= values
        return [found[key] for key in keys]

    def provenance(self, writer: str, answer: Answer, template: str) -> dict[str, Any]:
        return self._office.staff[writer].asked.provenance(self.step, answer, template)

    def close(self) -> None:
        """At the step's end. Raises DataError where too many of its calls failed."""
        if self.counts.failed > self._max_failed * self.counts.asked:
            raise self._too_many()

    def _looked_up(self, writer: str, questions: Iterable[tuple[T, Request]]) -> Iterator[tuple[T, Call]]:
        """Questions with their calls, some read at a time, since a look into the store costs more than a question."""
        remaining = iter(questions)
        while group := list(islice(remaining, TOGETHER)):
            calls = self._office.find(writer, [request for _, request in group])
            yield from ((thing, call) for (thing, _), call in zip(group, calls, strict=True))

    def _next(self, writer: str, waiting: deque[tuple[T, Call]]) -> tuple[T, Answer]:
        thing, call = waiting.popleft()
        answer = self._office.wait(call, self._tick)
        self.counts.answered += 1
        if answer.failed:
            self.counts.failed += 1
            self._reasons[f"writer.{writer}: {answer.failed}"] += 1
            answered = self.counts.asked - len(waiting)
            if self.counts.failed >= FEW and self.counts.failed > 2 * self._max_failed * answered:
                raise self._too_many()
        return thing, answer

    def _too_many(self) -> DataError:
        reasons = ", ".join(f"{count} x {reason}" for reason, count in self._reasons.most_common(5))
        return DataError(
            f"augmentation.{self.step}: {self.counts.failed} of {self.counts.asked} questions failed ({reasons}), more "
            f"than augment.max_failed_fraction={self._max_failed} allows; all answers are stored: see to the writer, "
            "and start the same command again to ask for the rest"
        )


def seed_of(*parts: str | int) -> int:
    """0 to 2**31 - 1, a hash of the parts."""
    digest = blake2b(dumps(parts, ensure_ascii=True).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1
