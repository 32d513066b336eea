"""What steps that make rows share: answers that become rows of a group, and the columns that a new row inherits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from kdcli.api import Example
from kdcli.augmentation._asking import Reply
from kdcli.augmentation._grouped import group_key
from kdcli.errors import ConfigError
from kdcli.store.examples import BadRow, content_key

OWN = frozenset(  # columns about one row's own text, which are not true of what is made of it
    {"id", "parents", "written", "source", "license", "answer", "tests", "samples", "output", "error", "correct"}
    | {"reference", "original", "draft", "chain", "critique", "by", "root", "rationale", "success", "share"}
)


def inherited(example: Example) -> dict[str, Any]:
    """Columns of a row that are true of what is made of it, such as its topic; its text becomes `meta.document`."""
    meta = {name: value for name, value in example.meta.items() if name not in OWN}
    return meta if example.text is None else {**meta, "document": example.text}


def records(replies: Sequence[Reply]) -> Iterator[tuple[Reply, Mapping[str, Any]]]:
    """All records of all replies."""
    return ((reply, record) for reply in replies for record in reply.records)


def changed(example: Example, **fields: Any) -> Example:
    """A row with other text, which came of `example`: that is its parent, and the old score says nothing of it."""
    return replace(example, **fields, score=None, meta={**example.meta, "parents": [content_key(example)]})


def together(example: Example, made: Sequence[Example], keep: bool) -> list[Example]:
    """Rows that answer one prompt, after the row itself where that is kept: of one group if they are several."""
    rows = [example, *made] if keep else list(made)
    group = group_key(example) if len(rows) > 1 else example.group
    return [replace(row, group=group) for row in rows]


def positive(where: str, **counts: int | None) -> None:
    """Raises ConfigError where a count is below 1; None is no count."""
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ConfigError(f"{where}.{name} is {count}; give 1 or more")


def text_of(example: Example, field: str) -> str:
    """A field that a step works on. Raises BadRow where the row lacks it."""
    found = getattr(example, field)
    if not found:
        raise BadRow("lacks a field", f"the row has no {field}")
    return found
