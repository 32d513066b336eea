"""Debates: two sides argue, then each states its position: DEBATunE, Li et al. 2024, arXiv:2402.10614."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Unpack

from kdcli.api import Example
from kdcli.augmentation._asking import AskingSettings, Question, blocks
from kdcli.augmentation._grouped import noted
from kdcli.augmentation._talking import Talk, Talking, said
from kdcli.errors import ConfigError
from kdcli.store.examples import content_key
from kdcli.text.prompt import Prompt


class ChatDebate(Talking):
    """Two sides argue about a row's topic for `rounds` rounds, then each states its position: two rows per topic.

    `pro` and `con` speak in turn (templates see `history`, [{role: pro | con, content}], `last`, `turn`, `turns` and
    `side`); `statement` asks for a side's position, and its `student` template makes the prompt. Both rows have
    `meta.side` and `meta.debate` (the history), and are of no group: their prompts differ.
    """

    extra = (*Talking.extra, "side")

    main = "pro"

    def __init__(
        self,
        *,
        pro: str = "chat/debate_pro",
        con: str = "chat/debate_con",
        statement: str = "chat/statement",
        writer_con: str | None = None,
        rounds: int = 3,
        **settings: Unpack[AskingSettings],
    ) -> None:
        super().__init__(prompt=pro, **settings)
        self.con = self.load(con, "con")
        self.statement = self.load(statement, "statement")
        self.writer_con = writer_con
        if rounds < 1:
            raise ConfigError(f"{self.where}.rounds is {rounds}; give 1 or more")
        self.rounds = rounds

    def writers(self) -> Sequence[str]:
        return tuple(dict.fromkeys((self.writer, self.writer_con or self.writer)))

    def __call__(self, examples: Iterable[Example]) -> Iterator[Example]:
        sides = (("pro", self.prompt, self.writer), ("con", self.con, self.writer_con or self.writer))
        for block in blocks(examples):
            results: list[list[Example]] = [[] for _ in block]
            talks = list(self.begun(block, results))
            for turn in range(1, self.rounds + 1):
                for side, prompt, writer in sides:
                    self.wave(talks, prompt, side, writer, turn=turn, turns=self.rounds)
            for side, _, writer in sides:
                for talk, row in self._stated([talk for talk in talks if talk.state == "open"], side, writer):
                    results[talk.place].append(row)
            for rows in results:
                yield from rows

    def _turn(self, talk: Talk, prompt: Prompt, role: str, turn: int, turns: int) -> Question:
        extra = {**self._extra(talk, role), "turn": turn}
        return self.question(talk.row, prompt=prompt, extra=extra, key=(role, turn), only=False, thing=talk)

    def _extra(self, talk: Talk, side: str) -> dict[str, Any]:
        last = talk.history[-1]["content"] if talk.history else ""
        return {"history": list(talk.history), "last": last, "turn": self.rounds, "turns": self.rounds, "side": side}

    def _stated(self, talks: Sequence[Talk], side: str, writer: str) -> Iterator[tuple[Talk, Example]]:
        questions = [
            self.question(
                t.row, prompt=self.statement, extra=self._extra(t, side), key=("statement", side), only=False, thing=t
            )
            for t in talks
        ]
        for question, replies in self.ask(questions, writer):
            if not replies:
                continue
            talk: Talk = question.thing
            key = content_key(talk.row)
            prompt = self.statement.for_student(talk.row, **self._extra(talk, side)) or talk.row.prompt
            if not prompt:
                self.desk.aside(talk.row, "lacks a field", f"the row has no prompt, {self.statement.name} no student")
                continue
            meta = {**talk.row.meta, "side": side, "debate": list(talk.history), "parents": [key]}
            bare = Example(prompt=prompt, response=said(replies[0].records[0]), domain=talk.row.domain, meta=meta)
            yield talk, noted(bare, [*talk.replies, *replies[:1]])
