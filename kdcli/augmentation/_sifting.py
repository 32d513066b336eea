"""What filters share: rows pass, or are set aside with a reason that is counted; and what of a row they look at."""

from __future__ import annotations

import json
import re
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar

from kdcli.api import Example, Transform
from kdcli.store.atomic import json_safe

T = TypeVar("T")
Field = Literal["prompt", "response", "text", "all"]

# Scripts written without blanks between words: each character counts as a word.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")


class Filter(Transform):
    """Keeps rows for which `reason` finds nothing. A rehearsal keeps all, since what it sees are no answers."""

    def __call__(self, examples: Iterable[Example]) -> Iterator[Example]:
        for example in examples:
            found = None if self.desk.rehearsal else self.reason(example)
            if found is None:
                yield example
            else:
                self.desk.aside(example, *found)

    @abstractmethod
    def reason(self, example: Example) -> tuple[str, str] | None:
        """Why a row is not kept: a short reason to count by and a sentence; None keeps it."""


def text_of(example: Example, field: Field) -> str | None:
    """What a filter looks at, or None where the row has none of it.

    Of a chat, `response` is the last turn of the assistant and `prompt` all turns before it; of a preference pair,
    `response` is the better answer. `all` is everything that may be learned from, parts on lines of their own.
    """
    if field == "text":
        return example.text
    turns = [(message["role"], message["content"]) for message in example.messages or ()]
    last = max((i for i, (role, _) in enumerate(turns) if role == "assistant"), default=len(turns))
    if field == "response":
        answer = example.response if example.response is not None else example.chosen
        return answer if answer is not None or last == len(turns) else turns[last][1]
    if field == "prompt":
        before = "\n".join(content for _, content in turns[:last])
        return example.prompt if example.prompt is not None else before or None
    own = (example.text, example.prompt, *(c for _, c in turns), example.response, example.chosen, example.rejected)
    return "\n".join(part for part in own if part is not None) or None


def lacking(field: Field) -> tuple[str, str]:
    """The reason for a row that has nothing to look at."""
    return "lacks a field", f"the step looks at {field}, which the row has not; set its `field`"


def words(text: str) -> list[str]:
    """Lower-case letters and digits between anything else. Of ASCII text the same as rouge-score's tokenizer makes;
    departs from it in keeping other alphabets, which it drops."""
    return WORD.findall(text.lower())


def batches(items: Iterable[T], size: int = 256) -> Iterator[list[T]]:
    """`size` at a time."""
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch


class Spool:
    """Rows in a file of the step's folder, for steps that must have seen all before they keep the first."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "rows.spool.jsonl"

    def fill(self, examples: Iterable[Example]) -> Iterator[Example]:
        """Write rows as they pass."""
        with open(self.path, "w", encoding="utf-8", newline="\n") as file:
            for example in examples:
                row = {f.name: value for f in fields(Example) if (value := getattr(example, f.name)) is not None}
                file.write(json.dumps(json_safe(row), ensure_ascii=False) + "\n")
                yield example

    def __iter__(self) -> Iterator[Example]:
        with open(self.path, encoding="utf-8") as file:
            for line in file:
                row: dict[str, Any] = json.loads(line)
                yield Example(**row)

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
