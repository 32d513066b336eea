"""What steps that ask a writer share: a prompt file, answers read in order, unusable ones set aside with a reason."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypedDict

from kdcli.api import Example, Request, Transform
from kdcli.errors import ConfigError
from kdcli.store.examples import BadRow, content_key
from kdcli.text.prompt import Prompt

CONTENT = frozenset({"text", "messages", "prompt", "response", "chosen", "rejected", "teacher_prompt", "score"})


class AskingSettings(TypedDict, total=False):
    """Settings of every step that asks; constructors hand them on as `**settings: Unpack[AskingSettings]`."""

    writer: str
    temperature: float | None
    max_tokens: int | None
    allow_truncated: bool


@dataclass(frozen=True, kw_only=True)
class Reply:
    """One text that a writer wrote about a row, read."""

    example: Example
    sample: int  # 0..n-1
    records: Sequence[Mapping[str, Any]]  # the fields of what it says; most parsers find exactly one record
    text: str
    written: Mapping[str, Any]  # provenance, for meta.written


class Asking(Transform):
    """A step that asks `writer` with the prompt file `prompt`."""

    extra: ClassVar[Sequence[str]] = ()  # names that the step gives to its templates, besides the row's fields

    def __init__(
        self,
        *,
        prompt: str,
        writer: str = "teacher",
        temperature: float | None = None,
        max_tokens: int | None = None,
        allow_truncated: bool = False,
    ) -> None:
        self.prompt = Prompt.load(prompt, where=f"augmentation: {type(self).__name__.lower()}.prompt", extra=self.extra)
        self.writer = writer
        self.temperature = temperature
        self.max_tokens = max_tokens
        self.allow_truncated = allow_truncated

    def writers(self) -> Sequence[str]:
        return (self.writer,)

    def fingerprint(self) -> str:
        return self.prompt.hash

    def request(self, messages: Sequence[Mapping[str, str]], *, seed: int, n: int = 1, form: bool = True) -> Request:
        """A request with this step's sampling settings, and the form that its parser reads."""
        return Request(
            messages=tuple(dict(message) for message in messages),
            n=n,
            seed=seed,
            temperature=self.temperature,
            max_tokens=self.max_tokens,
            form=self.prompt.parser.form() if form else None,
            rehearsal=self.prompt.example,
        )

    def asked(
        self, examples: Iterable[Example], *, n: int = 1, extra: Mapping[str, Any] | None = None
    ) -> Iterator[Reply]:
        """The prompt about each row, n samples; rows that lack a field, and answers of no use, are set aside."""
        return self.replies(self._questions(examples, n, extra or {}))

    def replies(self, questions: Iterable[tuple[Example, Request]], prompt: Prompt | None = None) -> Iterator[Reply]:
        """Answers read with the prompt's parser, in order; those of no use are set aside."""
        prompt = prompt or self.prompt
        for example, answer in self.desk.ask(self.writer, questions):
            if answer.failed:
                self.desk.aside(example, answer.failed, answer.detail)
                continue
            for sample, (text, finished) in enumerate(zip(answer.texts, answer.finished, strict=True)):
                if (records := self.read(example, prompt, text, finished)) is not None:
                    yield Reply(
                        example=example,
                        sample=sample,
                        records=records,
                        text=text,
                        written=self.desk.provenance(self.writer, answer, prompt.hash),
                    )

    def read(self, example: Example, prompt: Prompt, text: str, finished: str) -> list[dict[str, Any]] | None:
        """The records of one text, or None after setting it aside."""
        if finished == "refusal":
            self.desk.aside(example, "refused by the writer", "the server ended the answer for its content", text)
            return None
        if finished == "length" and not self.allow_truncated:
            self.desk.aside(example, "cut off at max_tokens", "raise max_tokens, or set allow_truncated", text)
            return None
        try:
            return prompt.parser(text)
        except BadRow as error:
            self.desk.aside(example, error.reason, str(error), text)
            return None

    def _questions(
        self, examples: Iterable[Example], n: int, extra: Mapping[str, Any]
    ) -> Iterator[tuple[Example, Request]]:
        for example in examples:
            try:
                messages = self.prompt.messages(example, **extra)
            except BadRow as error:
                self.desk.aside(example, error.reason, str(error))
                continue
            yield example, self.request(messages, seed=self.desk.seed(content_key(example)), n=n)


def filled(example: Example, record: Mapping[str, Any], written: Mapping[str, Any] | None = None) -> Example:
    """`example` with the fields of a record: content and score where they are an example's own, else in `meta`; and
    one more entry in `meta.written`."""
    own = {name: value for name, value in record.items() if name in CONTENT}
    meta = {**example.meta, **{name: value for name, value in record.items() if name not in CONTENT}}
    if written is not None:
        meta["written"] = [*example.meta.get("written", ()), dict(written)]
    return replace(example, **own, meta=meta)


def child(parents: Sequence[Example], record: Mapping[str, Any], written: Mapping[str, Any], **fields: Any) -> Example:
    """A new row that came of `parents`: their keys in `meta.parents`, the first one's domain, source and licence."""
    if not parents:
        raise ConfigError("a row that was written needs at least one parent")
    first = parents[0]
    licences = sorted({str(one.meta["license"]) for one in parents if one.meta.get("license")})
    meta: dict[str, Any] = {"parents": [content_key(one) for one in parents]}
    if first.meta.get("source"):
        meta["source"] = first.meta["source"]
    if licences:
        meta["license"] = licences[0] if len(licences) == 1 else licences
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
