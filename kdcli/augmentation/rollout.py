"""Rollout: the student answers, so that feedback is about what it writes itself (GKD, arXiv:2306.13649)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TypedDict, Unpack

from kdcli.api import Example
from kdcli.augmentation._asking import Question, Reply, filled
from kdcli.augmentation._grouped import Grouped, Heard, demand, group_key
from kdcli.errors import ConfigError
from kdcli.store.examples import content_key

OF_ANSWER = frozenset(  # what `meta` says of the answer that is there, and not of another one to the same prompt
    {"rationale", "critique", "draft", "chain", "correct", "output", "error", "share", "reason", "comparisons"}
)


class RolloutSettings(TypedDict, total=False):
    """Settings of every step that asks, but for `writer`, whose default is another here."""

    temperature: float | None
    max_tokens: int | None
    allow_truncated: bool
    attempts: int
    only: str | None


class Rollout(Grouped):
    """`n` answers of `writer` to each prompt, as rows of its group; `meta.by` of every row says whose it is.

    `keep`: rows that have an answer stay in the group, as `meta.by` = `data` unless they have a `meta.by` already; else
    their answer goes to `meta.reference`. The prompts of a group are asked once each.
    """

    def __init__(
        self,
        *,
        prompt: str = "rollout/plain",
        writer: str = "student",
        n: int = 1,
        keep: bool = True,
        **settings: Unpack[RolloutSettings],
    ) -> None:
        super().__init__(prompt=prompt, writer=writer, **settings)
        demand(self.prompt, self.where, ("response",))
        if n < 1:
            raise ConfigError(f"{self.where}.n is {n}; give 1 or more answers a prompt")
        self.n = n
        self.keep = keep

    def about(self, rows: Sequence[Example]) -> Iterable[Question]:
        seen: set[str | None] = set()
        for place, row in enumerate(rows):
            if row.prompt not in seen:
                seen.add(row.prompt)
                bare = replace(row, response=None, score=None)  # what is set aside if nobody answers
                yield self.question(bare, n=self.n, only=False, key=(content_key(row),), thing=place)

    def settled(self, rows: Sequence[Example], heard: Heard) -> Sequence[Iterable[Example]]:
        results = [[self._own(row, rows[0])] if self.keep and row.response is not None else [] for row in rows]
        made = [self._answered(rows[i], rows[0], reply) for i, replies in heard for reply in replies]
        results[-1] += [row for row in made if row is not None]
        return results

    def _own(self, row: Example, first: Example) -> Example:
        return replace(row, group=group_key(first), meta={"by": "data", **row.meta})

    def _answered(self, row: Example, first: Example, reply: Reply) -> Example | None:
        meta = {name: value for name, value in row.meta.items() if name not in OF_ANSWER} | {"by": self.writer}
        if row.response is not None:
            meta["reference"] = row.response
        bare = replace(row, response=None, score=None, group=group_key(first), meta=meta)
        made = filled(bare, reply.records[0], reply.written)
        if made.response:
            return made
        self.desk.aside(bare, "empty answer", "what was read as the response is empty", reply.text)
        return None
