"""What conversations share: speakers take turns, and all conversations of a block are asked for one turn at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from kdcli.api import Example
from kdcli.augmentation._asking import Asking, Question, Reply
from kdcli.augmentation._grouped import noted
from kdcli.store.examples import BadRow, content_key
from kdcli.text.prompt import Prompt

SAID = ("message", "response", "content", "text")  # fields of a record that may hold what was said


@dataclass(kw_only=True)
class Talk:
    """A conversation while it is had."""

    place: int
    row: Example
    history: list[dict[str, str]] = field(default_factory=list)  # [{role, content}]
    replies: list[Reply] = field(default_factory=list)
    state: str = "open"  # open, done, or lost: set aside

    def add(self, role: str, reply: Reply) -> str:
        text = said(reply.records[0])
        self.history.append({"role": role, "content": text})
        self.replies.append(reply)
        return text


class Talking(Asking):
    """Asks for one turn after the other, in waves over the conversations of a block."""

    extra = ("history", "last", "turn", "turns")

    def begun(self, block: Sequence[Example], results: list[list[Example]]) -> Iterator[Talk]:
        """A conversation per row that the step is for; the others pass."""
        for place, row in enumerate(block):
            try:
                if self.applies(row):
                    yield Talk(place=place, row=row)
                else:
                    results[place] = [row]
            except BadRow as error:
                self.desk.aside(row, error.reason, str(error))

    def wave(self, talks: Iterable[Talk], prompt: Prompt, role: str, writer: str, *, turn: int, turns: int) -> None:
        """One turn of every open conversation."""
        questions = [self._turn(talk, prompt, role, turn, turns) for talk in talks if talk.state == "open"]
        for question, replies in self.ask(questions, writer):
            talk: Talk = question.thing
            if replies:
                self.heard(talk, role, replies[0])
            else:
                talk.state = "lost"

    def heard(self, talk: Talk, role: str, reply: Reply) -> None:
        talk.add(role, reply)

    def _turn(self, talk: Talk, prompt: Prompt, role: str, turn: int, turns: int) -> Question:
        last = talk.history[-1]["content"] if talk.history else ""
        extra = {"history": list(talk.history), "last": last, "turn": turn, "turns": turns}
        question = self.question(talk.row, prompt=prompt, extra=extra, key=(role, turn), only=False, thing=talk)
        if question.request is None or not continues(prompt) or not talk.history[:-1]:
            return question
        head, rest = split(question.request.messages)
        return replace(question, request=replace(question.request, messages=(*head, *talk.history[:-1], *rest)))


def said(record: Mapping[str, Any]) -> str:
    """What a record holds of speech."""
    return str(next((record[name] for name in SAID if record.get(name)), "")).strip()


def continues(prompt: Prompt) -> bool:
    """Whether a prompt leaves it to the chat that it is asked in to show the earlier turns."""
    parts = [prompt.content.get("system"), prompt.content.get("user"), *(prompt.content.get("turns") or ())]
    return not any("history" in str(part) for part in parts)


def split(messages: Sequence[Mapping[str, str]]) -> tuple[list[Mapping[str, str]], list[Mapping[str, str]]]:
    """A rendered prompt before and from its last message."""
    return list(messages[:-1]), list(messages[-1:])


def as_messages(row: Example, messages: Sequence[Mapping[str, str]], replies: Iterable[Reply]) -> Example:
    """A row that is this chat, and came of `row`."""
    meta = {**row.meta, "parents": [content_key(row)]}
    if row.text is not None:
        meta.setdefault("document", row.text)
    empty = dict.fromkeys(("text", "prompt", "response", "chosen", "rejected", "teacher_prompt"))
    made = replace(row, **empty, messages=[dict(message) for message in messages], score=None, meta=meta)
    return noted(made, replies)
