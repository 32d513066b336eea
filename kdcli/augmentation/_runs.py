"""A trajectory on its way, and the rows that it becomes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from kdcli.api import Example
from kdcli.augmentation._asking import Reply
from kdcli.augmentation._environments import Call, Episode
from kdcli.augmentation._talking import as_messages

Message = Mapping[str, str]


@dataclass(kw_only=True)
class Run:
    """A trajectory on its way; `turns` and `episode` are those of the present attempt."""

    place: int
    row: Example
    sample: int
    simulated: Sequence[Mapping[str, Any]] = ()
    episode: Episode | None = None
    head: list[dict[str, str]] = field(default_factory=list)  # how the attempt begins
    turns: list[dict[str, str]] = field(default_factory=list)  # the agent's steps and what it observed
    replies: list[Reply] = field(default_factory=list)
    reflections: list[str] = field(default_factory=list)
    shown: list[dict[str, str]] = field(default_factory=list)  # how the trajectory begins for the student
    attempts: int = 0
    call: Call | None = None  # for the writer that plays the tools
    lost: bool = False  # set aside

    @property
    def open(self) -> bool:
        return not self.lost and self.episode is not None and not self.episode.finished

    @property
    def failed(self) -> bool:
        """Whether another attempt is worth while."""
        return not self.lost and (self.episode is None or not self.episode.finished or self.episode.success is False)

    def messages(self) -> Example:
        """The whole trajectory as a chat."""
        made = as_messages(self.row, [*self.shown, *self._answered()], self.replies)
        return replace(made, score=self.score, meta={**made.meta, **self.facts()})

    def steps(self) -> list[Example]:
        """A row for each step: the prompt is all that the agent sees by then, the response what it writes."""
        turns = self._answered()
        return [self._step(turns, i) for i, turn in enumerate(turns) if turn["role"] == "assistant"]

    @property
    def score(self) -> float | None:
        return None if self.episode is None else self.episode.score

    def facts(self) -> dict[str, Any]:
        """What `meta` says of it."""
        assert self.episode is not None
        steps = sum(turn["role"] == "assistant" for turn in self.turns)
        facts = {**self.episode.facts(), "finished": self.episode.finished, "steps": steps, "attempts": self.attempts}
        if self.episode.success is not None:
            facts["success"] = self.episode.success
        return facts

    def _answered(self) -> list[dict[str, str]]:
        """The turns without a last observation, which nobody answers."""
        last = max((i for i, turn in enumerate(self.turns) if turn["role"] == "assistant"), default=-1)
        return self.turns[: last + 1]

    def _step(self, turns: Sequence[Message], i: int) -> Example:
        assert self.episode is not None
        seen = [*self.shown, *turns[:i]]
        if i and (latest := self.episode.latest(turns[i - 1]["content"])) is not None:
            seen = [*self.shown, {"role": "user", "content": latest}]
        made = as_messages(self.row, (), self.replies)
        return replace(
            made,
            messages=None,
            prompt="\n\n".join(message["content"] for message in seen),
            response=turns[i]["content"],
            group=None,
            score=self.score,
            meta={**made.meta, **self.facts(), "step": 1 + sum(turn["role"] == "assistant" for turn in turns[:i])},
        )


def transcript(turns: Iterable[Message]) -> str:
    """A trajectory as text."""
    return "\n".join(turn["content"] for turn in turns)
