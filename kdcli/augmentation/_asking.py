"""What steps that ask a writer share: prompt files, answers read in order, unusable ones set aside with a reason."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypedDict

import xxhash

from kdcli.api import Answer, Example, Request, Transform
from kdcli.errors import ConfigError
from kdcli.store.examples import BadRow, content_key
from kdcli.text.prompt import Expression, Prompt, variables

CONTENT = frozenset({"text", "messages", "prompt", "response", "chosen", "rejected", "teacher_prompt", "score"})
REFUSED = "refused by the writer"
HELD = 4096  # rows that pass unasked and wait for an answer before them, at most


class AskingSettings(TypedDict, total=False):
    """Settings of every step that asks; constructors hand them on as `**settings: Unpack[AskingSettings]`."""

    writer: str
    temperature: float | None
    max_tokens: int | None
    allow_truncated: bool
    attempts: int
    only: str | None


@dataclass(frozen=True, kw_only=True)
class Reply:
    """One text that a writer wrote about a row, read."""

    example: Example
    sample: int  # 0..n-1
    records: Sequence[Mapping[str, Any]]  # the fields of what it says; most parsers find exactly one record
    text: str
    written: Mapping[str, Any]  # provenance, for meta.written


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked about a row. Without a request nothing is asked: the row passes in its place, or is set aside for
    its `problem`."""

    example: Example
    prompt: Prompt
    request: Request | None = None
    problem: BadRow | None = None
    thing: Any = None  # what the step wants back beside the replies


class Asking(Transform):
    """A step that asks `writer` with the prompt file `prompt`.

    A step that makes rows of one row's answers defines `made`. One that asks several prompts loads the others with
    `load`, and asks with `ask(questions)`, where `self.question(example, prompt=..., extra=...)` makes a question.
    `only`: rows for which this expression is false pass unchanged, in their place. `attempts`: a text that cannot be
    read, or was cut off, is asked for again with another seed, so often in all.
    """

    extra: ClassVar[Sequence[str]] = ()  # names that the step gives to its templates, besides the row's fields
    n: int = 1  # samples about each row
    main: ClassVar[str] = "prompt"  # the setting that names the prompt, for messages

    def __init__(
        self,
        *,
        prompt: str,
        writer: str = "teacher",
        temperature: float | None = None,
        max_tokens: int | None = None,
        allow_truncated: bool = False,
        attempts: int = 1,
        only: str | None = None,
    ) -> None:
        self.where = f"augmentation: {type(self).__name__.lower()}"
        self.prompts: list[Prompt] = []
        self.prompt = self.load(prompt, self.main)
        self.writer = writer
        self.temperature = temperature
        self.max_tokens = max_tokens
        self.allow_truncated = allow_truncated
        self.attempts = attempts
        self.only = None if only is None else Expression(only, where=f"{self.where}.only")
        if attempts < 1:
            raise ConfigError(f"{self.where}.attempts is {attempts}; give 1 or more")

    def load(self, name: str, setting: str, extra: Sequence[str] | None = None) -> Prompt:
        """The prompt file that a setting names; what the step writes then depends on it too. Raises ConfigError."""
        prompt = Prompt.load(name, where=f"{self.where}.{setting}", extra=self.extra if extra is None else extra)
        self.prompts.append(prompt)
        return prompt

    def writers(self) -> Sequence[str]:
        return (self.writer,)

    def fingerprint(self) -> str:
        return xxhash.xxh3_128_hexdigest(" ".join(prompt.hash for prompt in self.prompts).encode())

    def __call__(self, examples: Iterable[Example]) -> Iterator[Example]:
        for example, replies in self.asked(examples, n=self.n):
            if replies is None:
                yield example
            elif replies:
                yield from self.made(example, replies)

    def made(self, example: Example, replies: Sequence[Reply]) -> Iterable[Example]:
        """The rows that come of one row and what was written about it, at least one reply."""
        raise NotImplementedError(f"{type(self).__name__} defines neither made nor __call__")

    def asked(
        self, examples: Iterable[Example], *, n: int = 1, extra: Mapping[str, Any] | None = None
    ) -> Iterator[tuple[Example, list[Reply] | None]]:
        """The prompt about each row, n samples, in order: the row and what of use was written, None where `only` lets
        it pass. Rows that lack a field, and texts of no use, are set aside."""
        questions = (self.question(example, n=n, extra=extra) for example in examples)
        for question, replies in self.ask(questions):
            if question.problem is None:
                yield question.example, None if question.request is None else replies

    def question(
        self,
        example: Example,
        *,
        prompt: Prompt | None = None,
        n: int = 1,
        extra: Mapping[str, Any] | None = None,
        key: Sequence[str | int] = (),
        only: bool = True,
        thing: Any = None,
        messages: Sequence[Mapping[str, str]] | None = None,
    ) -> Question:
        """What is asked about a row: `prompt` rendered (or `messages`), with a seed of the row's content and `key`.

        `only=False` asks whatever the setting `only` says, for the second question about a row and those after it."""
        prompt = prompt or self.prompt
        blank = Question(example=example, prompt=prompt, thing=thing)
        try:
            if only and not self.applies(example):
                return blank
            if messages is None:
                messages = prompt.messages(example, **(extra or {}))
        except BadRow as error:
            return replace(blank, problem=error)
        return replace(blank, request=self.request(messages, seed=self._seed(example, key), n=n, prompt=prompt))

    def applies(self, example: Example) -> bool:
        """Whether the step is for this row: what `only` says. Raises BadRow where the row lacks what it names."""
        return self.only is None or self.only.holds(variables(example))

    def request(
        self, messages: Sequence[Mapping[str, str]], *, seed: int, n: int = 1, prompt: Prompt | None = None
    ) -> Request:
        """A request with this step's sampling settings, and the form that the prompt's parser reads."""
        prompt = prompt or self.prompt
        return Request(
            messages=tuple(dict(message) for message in messages),
            n=n,
            seed=seed,
            temperature=self.temperature,
            max_tokens=self.max_tokens,
            form=prompt.parser.form(),
            rehearsal=prompt.example,
        )

    def ask(self, questions: Iterable[Question], writer: str | None = None) -> Iterator[tuple[Question, list[Reply]]]:
        """Each question with what of use was written, in order; the rest is set aside. Streams: questions are read
        ahead while answers are awaited, also through further attempts."""
        started: Iterable[_Asked] = (_Asked(question) for question in questions)
        for attempt in range(self.attempts):
            started = self._attempt(started, writer or self.writer, attempt)
        for asked in started:
            if asked.question.problem is not None:
                self.desk.aside(asked.question.example, asked.question.problem.reason, str(asked.question.problem))
            for reason, detail, text in asked.unusable.values():
                self.desk.aside(asked.question.example, reason, detail, text)
            yield asked.question, [asked.replies[sample] for sample in sorted(asked.replies)]

    def _attempt(self, started: Iterable[_Asked], writer: str, attempt: int) -> Iterator[_Asked]:
        """Ask for what is still wanted; questions that want nothing pass in their place."""
        for asked, answer in _in_place(self.desk.ask, writer, ((one, self._wanted(one, attempt)) for one in started)):
            if answer is not None:
                self._read(asked, answer, writer)
            yield asked

    def _wanted(self, asked: _Asked, attempt: int) -> Request | None:
        request = asked.question.request
        if request is None or not asked.open:
            return None
        if attempt == 0:
            return request
        return replace(request, seed=self.desk.seed(request.seed, "attempt", attempt), n=len(asked.open))

    def _read(self, asked: _Asked, answer: Answer, writer: str) -> None:
        """Put the texts of an answer in the places that had none of use."""
        prompt, places = asked.question.prompt, asked.open
        asked.open = []
        if answer.failed:
            asked.unusable = asked.unusable or {0: (answer.failed, answer.detail, "")}
            return
        for place, text, finished in zip(places, answer.texts, answer.finished, strict=True):
            try:
                records = self.read(prompt, text, finished)
            except BadRow as error:
                asked.unusable[place] = (error.reason, str(error), text)
                if error.reason != REFUSED:
                    asked.open.append(place)
                continue
            asked.unusable.pop(place, None)
            asked.replies[place] = Reply(
                example=asked.question.example,
                sample=place,
                records=records,
                text=text,
                written=self.desk.provenance(writer, answer, prompt.hash),
            )

    def read(self, prompt: Prompt, text: str, finished: str) -> list[dict[str, Any]]:
        """The records of one text. Raises BadRow where it is of no use."""
        if finished == "refusal":
            raise BadRow(REFUSED, "the server ended the answer for its content")
        if finished == "length" and not self.allow_truncated:
            raise BadRow("cut off at max_tokens", "raise max_tokens, or set allow_truncated")
        return prompt.parser(text)

    def _seed(self, example: Example, key: Sequence[str | int]) -> int:
        return self.desk.seed(content_key(example), *key)


class _Asked:
    """A question while it is answered."""

    def __init__(self, question: Question) -> None:
        self.question = question
        self.open = list(range(question.request.n if question.request else 0))  # samples that may still be asked for
        self.replies: dict[int, Reply] = {}  # sample -> what of use was written
        self.unusable: dict[int, tuple[str, str, str]] = {}  # sample -> reason, detail, text


def _in_place(
    ask: Callable[[str, Iterable[tuple[_Asked, Request]]], Iterator[tuple[_Asked, Answer]]],
    writer: str,
    wanted: Iterable[tuple[_Asked, Request | None]],
) -> Iterator[tuple[_Asked, Answer | None]]:
    """Like `ask`, where things without a request come back in their place, unanswered; at most HELD of them wait."""
    source = iter(wanted)
    order: deque[_Asked | None] = deque()  # None: one that was asked
    more = True

    def questions() -> Iterator[tuple[_Asked, Request]]:
        nonlocal more
        passing = 0
        for thing, request in source:
            order.append(thing if request is None else None)
            passing += request is None
            if request is not None:
                yield thing, request
            elif passing >= HELD:
                return
        more = False

    while more:
        for asked, answer in ask(writer, questions()):
            while (thing := order.popleft()) is not None:
                yield thing, None
            yield asked, answer
        while order:
            if (thing := order.popleft()) is not None:
                yield thing, None


def filled(example: Example, record: Mapping[str, Any], written: Mapping[str, Any] | None = None) -> Example:
    """`example` with the fields of a record: content and score where they are an example's own, else in `meta`; and
    one more entry in `meta.written`."""
    own = {name: value for name, value in record.items() if name in CONTENT}
    if "score" in own:
        own["score"] = float(own["score"])
    meta = {**example.meta, **{name: value for name, value in record.items() if name not in CONTENT}}
    if written is not None:
        meta["written"] = [*example.meta.get("written", ()), dict(written)]
    return replace(example, **own, meta=meta)


def child(parents: Sequence[Example], record: Mapping[str, Any], written: Mapping[str, Any], **fields: Any) -> Example:
    """A new row that came of `parents`: their keys in `meta.parents`, the first one's domain and source, the licences
    of all, and before the new entry of `meta.written` theirs, each once: whose words are in it is not forgotten."""
    if not parents:
        raise ConfigError("a row that was written needs at least one parent")
    first = parents[0]
    found = (one.meta.get("license") for one in parents)
    licences = sorted({str(one) for each in found if each for one in (each if isinstance(each, list) else [each])})
    meta: dict[str, Any] = {**fields.pop("meta", {}), "parents": list(dict.fromkeys(map(content_key, parents)))}
    if first.meta.get("source"):
        meta["source"] = first.meta["source"]
    if licences:
        meta["license"] = licences[0] if len(licences) == 1 else licences
    if earlier := [dict(entry) for one in parents for entry in one.meta.get("written", ())]:
        meta["written"] = [entry for number, entry in enumerate(earlier) if entry not in earlier[:number]]
    base = Example(domain=first.domain, meta=meta, **fields)
    return filled(base, record, written)


def groups(examples: Iterable[Example]) -> Iterator[list[Example]]:
    """Rows of equal `group`, which stand together; a row without one is alone."""
    held: list[Example] = []
    for example in examples:
        if held and (example.group is None or example.group != held[-1].group):
            yield held
            held = []
        held.append(example)
    if held:
        yield held


def blocks(examples: Iterable[Example], size: int = 256) -> Iterator[list[Example]]:
    """`size` rows at a time, for steps that ask about a row more than once."""
    held: list[Example] = []
    for example in examples:
        held.append(example)
        if len(held) == size:
            yield held
            held = []
    if held:
        yield held
