"""Conversations of two simulated speakers: UltraChat, Ding et al. 2023, arXiv:2305.14233."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Unpack

from kdcli.api import Example
from kdcli.augmentation._asking import AskingSettings, Reply, blocks
from kdcli.augmentation._talking import Talk, Talking, as_messages, said
from kdcli.errors import ConfigError
from kdcli.store.examples import BadRow
from kdcli.text.prompt import Expression, Prompt

ROLES = {"user": "user", "human": "user", "assistant": "assistant", "ai": "assistant", "system": "system"}


class Chat(Talking):
    """`turns` messages of each role, by `assistant` and `user` prompts, into `messages`.

    A row's prompt is the first message, and a row's messages are how the conversation begins; without either the user
    prompt begins it. Templates see `history` ([{role, content}] so far), `last` (the latest message), `turn` (from 1)
    and `turns`. A prompt that does not name `history` gets the earlier turns as turns of the chat it is asked in, which
    fits the assistant. `user: null`: one call of the assistant prompt writes the whole conversation, records with
    `role` and `content` (Baize, arXiv:2304.01196). `stop`: an expression over `message`; where it holds for what a
    speaker says, the conversation ends before it. What the assistant prompt's `student` template gives becomes the
    system message.
    """

    main = "assistant"

    def __init__(
        self,
        *,
        assistant: str = "chat/assistant",
        user: str | None = "chat/user",
        writer_user: str | None = None,
        turns: int = 3,
        stop: str | None = None,
        **settings: Unpack[AskingSettings],
    ) -> None:
        super().__init__(prompt=assistant, **settings)
        self.user = None if user is None else self.load(user, "user")
        self.writer_user = writer_user
        if turns < 1:
            raise ConfigError(f"{self.where}.turns is {turns}; give 1 or more messages of each role")
        self.turns = turns
        self.stop = None if stop is None else Expression(stop, where=f"{self.where}.stop", names=("message",))

    def writers(self) -> Sequence[str]:
        return tuple(dict.fromkeys((self.writer, self.writer_user or self.writer)))

    def __call__(self, examples: Iterable[Example]) -> Iterator[Example]:
        for block in blocks(examples):
            results: list[list[Example]] = [[] for _ in block]
            talks = list(self.begun(block, results))
            if self.user is None:
                self.wave(talks, self.prompt, "whole", self.writer, turn=1, turns=self.turns)
            else:
                self._talked(talks, self.user)
            for talk in talks:
                results[talk.place] = list(self._row(talk))
            for rows in results:
                yield from rows

    def _talked(self, talks: Sequence[Talk], user: Prompt) -> None:
        for talk in talks:
            opening = [{"role": "user", "content": talk.row.prompt}] if talk.row.prompt else ()
            talk.history = [dict(message) for message in talk.row.messages or opening]
        for turn in range(1, self.turns + 1):
            silent = [talk for talk in talks if not talk.history or talk.history[-1]["role"] != "user"]
            self.wave(silent, user, "user", self.writer_user or self.writer, turn=turn, turns=self.turns)
            self.wave(talks, self.prompt, "assistant", self.writer, turn=turn, turns=self.turns)

    def heard(self, talk: Talk, role: str, reply: Reply) -> None:
        if role == "whole":
            talk.history = turns_of(reply.records)
            talk.replies.append(reply)
            return
        text = talk.add(role, reply)
        if self.stop is not None and not self.desk.rehearsal and self.stop.holds({"message": text}):
            talk.history.pop()
            talk.state = "done"

    def _row(self, talk: Talk) -> Iterator[Example]:
        if talk.state == "lost":
            return
        while talk.history and talk.history[-1]["role"] == "user":
            talk.history.pop()  # nobody answers it
        if not any(message["role"] == "assistant" for message in talk.history):
            self.desk.aside(talk.row, "no conversation", "it ended before the assistant said anything")
            return
        try:
            system = self.prompt.for_student(talk.row, history=talk.history, last="", turn=0, turns=self.turns)
        except BadRow as error:
            self.desk.aside(talk.row, error.reason, str(error))
            return
        head = [{"role": "system", "content": system}] if system else []
        yield as_messages(talk.row, [*head, *talk.history], talk.replies)


def turns_of(records: Iterable[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Records with `role` and `content` as a chat; what one role says twice running is one message."""
    chat: list[dict[str, str]] = []
    for record in records:
        role, text = ROLES.get(str(record.get("role", "")).strip().casefold()), said(record)
        if role is None or not text:
            continue
        if chat and chat[-1]["role"] == role:
            chat[-1]["content"] += f"\n{text}"
        else:
            chat.append({"role": role, "content": text})
    return chat
