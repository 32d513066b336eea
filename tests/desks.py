"""A desk for tests of one step: answers from a function, everything in memory, in order."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from kdcli.api import Answer, Example, Request, Transform

Say = Callable[[Request], str | list[str] | Answer]


class FakeDesk:
    """`say` makes the text(s) of a request, or a whole Answer; `asked` and `set_aside` hold what happened."""

    def __init__(self, say: Say | None = None, *, rehearsal: bool = False, folder: Path | None = None) -> None:
        self.step = "step"
        self.rehearsal = rehearsal
        self.say = say or (lambda request: request.rehearsal)
        self.asked: list[tuple[str, Request]] = []
        self.set_aside: list[tuple[Example, str]] = []
        self.memory: dict[tuple[str, str], Any] = {}
        self.folder = folder or Path()

    def ask(self, writer: str, questions: Iterable[tuple[Any, Request]]) -> Iterator[tuple[Any, Answer]]:
        for thing, request in questions:
            self.asked.append((writer, request))
            said = [request.rehearsal] * request.n if self.rehearsal else self.say(request)
            if isinstance(said, Answer):
                yield thing, said
                continue
            texts = [said] * request.n if isinstance(said, str) else said
            yield thing, Answer(texts=texts, finished=["stop"] * len(texts), model="fake", date="2026-01-01")

    def aside(self, example: Example, reason: str, detail: str = "", text: str = "") -> None:
        self.set_aside.append((example, reason))

    def seed(self, *parts: str | int) -> int:
        return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big") >> 1

    def remember(self, kind: str, keys: Sequence[str], compute: Callable[[Sequence[int]], Sequence[Any]]) -> list[Any]:
        missing = [i for i, key in enumerate(keys) if (kind, key) not in self.memory]
        for i, value in zip(missing, compute(missing) if missing else [], strict=True):
            self.memory[kind, keys[i]] = value
        return [self.memory[kind, key] for key in keys]

    def provenance(self, writer: str, answer: Answer, template: str) -> dict[str, Any]:
        return {"step": self.step, "by": writer, "teacher": answer.model, "template": template}

    @property
    def reasons(self) -> list[str]:
        return [reason for _, reason in self.set_aside]


def run(step: Transform, examples: Iterable[Example], say: Say | None = None, **settings: Any) -> list[Example]:
    """What a step makes of rows; its desk stays in `step.desk`."""
    step.open(FakeDesk(say, **settings))
    return list(step(examples))
