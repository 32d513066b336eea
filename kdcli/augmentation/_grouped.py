"""What steps share that ask several questions about a group of rows, and go on when all of them are answered."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from kdcli.api import Example
from kdcli.augmentation._asking import Asking, Question, Reply, groups
from kdcli.errors import ConfigError
from kdcli.store.examples import BadRow, content_key
from kdcli.text.prompt import Prompt

END = object()  # the tag of the question that stands for the end of a group: it asks nothing
Heard = Sequence[tuple[Any, list[Reply]]]  # the tag of each question, and what of use was answered


@dataclass(kw_only=True)
class _Unit:
    """Rows that are asked about together."""

    rows: list[tuple[bool, Example]]  # whether the step is for the row
    heard: list[tuple[Any, list[Reply]]] = field(default_factory=list)


class Grouped(Asking):
    """Asks about whole groups, and streams: the questions of later groups are read while answers are awaited.

    A leaf says what is asked in `about`, each question with its tag in `thing`, and what becomes of the rows in
    `settled`. Rows that `only` excludes take no part, and pass in their places.
    """

    def __call__(self, examples: Iterable[Example]) -> Iterator[Example]:
        for question, replies in self.ask(self._questions(examples)):
            unit, tag = question.thing
            if tag is END:
                yield from self._told(unit)
            else:
                unit.heard.append((tag, replies))

    def units(self, examples: Iterable[Example]) -> Iterator[list[Example]]:
        """Rows that are asked about together."""
        return groups(examples)

    @abstractmethod
    def about(self, rows: Sequence[Example]) -> Iterable[Question]:
        """The questions about some rows, made with `only=False` and a tag in `thing`."""

    @abstractmethod
    def settled(self, rows: Sequence[Example], heard: Heard) -> Sequence[Iterable[Example]]:
        """What comes of each row, in place of it; nothing, after it was set aside."""

    def _questions(self, examples: Iterable[Example]) -> Iterator[Question]:
        for rows in self.units(examples):
            unit = _Unit(rows=self._chosen(rows))
            chosen = [row for applies, row in unit.rows if applies]
            for question in self.about(chosen) if chosen else ():
                yield replace(question, thing=(unit, question.thing))
            yield Question(example=rows[0], prompt=self.prompt, thing=(unit, END))

    def _chosen(self, rows: Iterable[Example]) -> list[tuple[bool, Example]]:
        chosen = []
        for row in rows:
            try:
                chosen.append((self.applies(row), row))
            except BadRow as error:
                self.desk.aside(row, error.reason, str(error))
        return chosen

    def _told(self, unit: _Unit) -> Iterator[Example]:
        chosen = [row for applies, row in unit.rows if applies]
        results = iter(self.settled(chosen, unit.heard) if chosen else ())
        for applies, row in unit.rows:
            if applies:
                yield from next(results)
            else:
                yield row


def noted(example: Example, replies: Iterable[Reply], into: str | None = None, value: Any = None) -> Example:
    """`example` with the provenance of replies, each said once, and a value in `into`: `score`, or a name in `meta`."""
    written = list(example.meta.get("written", ()))
    for reply in replies:
        if reply.written not in written:
            written.append(dict(reply.written))
    meta = {**example.meta, "written": written} if written else dict(example.meta)
    if into is None or value is None:
        return replace(example, meta=meta)
    if into == "score":
        return replace(example, score=value, meta=meta)
    return replace(example, meta={**meta, into: value})


def group_key(example: Example) -> str:
    """What the answers to the prompt of this row are grouped by."""
    return example.group or content_key(example)


def answer_of(example: Example) -> str:
    """What feedback is about: the response, or the prompt while there is none. Raises BadRow."""
    found = example.response or example.prompt or example.text
    if not found:
        raise BadRow("lacks a field", "the row has neither response nor prompt nor text")
    return found


def plain(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record without the score, which has a place of its own."""
    return {name: value for name, value in record.items() if name != "score"}


def demand(prompt: Prompt, where: str, *alternatives: Sequence[str]) -> None:
    """Raises ConfigError unless the prompt's records have all fields of one alternative."""
    if not any(set(fields) <= set(prompt.parser.fields) for fields in alternatives):
        wanted = " or ".join(" and ".join(fields) for fields in alternatives)
        found = ", ".join(prompt.parser.fields)
        raise ConfigError(f"{where}: {prompt.name} reads {found} from an answer, but this step needs {wanted}")
