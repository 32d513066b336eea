"""Rows made of a row's own fields by templates, such as a row per task of Hsieh et al. 2023 (distilling step by step),
arXiv:2305.02301. Asks nobody."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from kdcli.api import Example, Transform
from kdcli.augmentation._asking import groups
from kdcli.errors import ConfigError
from kdcli.store.examples import CONTENT, FORMS, BadRow
from kdcli.text.parse import is_chat
from kdcli.text.prompt import Expression, rendered, template, variables

FIELDS = (*CONTENT, "domain", "group", "score", "weight")
ALONE = re.compile(r"\{\{(?P<expression>(?:(?!\}\}).)+)\}\}", re.DOTALL)


class Reshape(Transform):
    """One row in, a row out per mapping of `rows`: {FIELD: Jinja template}, where FIELD is a field or meta.NAME.

    Every template sees the row as it was. A field that is null, or whose template gives nothing, is unset; fields that
    are not named stay, but for those in `drop`. A template that is one expression, such as `{{ meta.triples }}`, gives
    its value as it is to meta.NAME, score and weight; `messages` is a list of {role, content}, or such an expression.
    A row whose result is of no form that a reader takes is set aside. Of a group with several mappings, the rows of
    each mapping are a group.
    """

    def __init__(self, *, rows: Sequence[Mapping[str, Any]], drop: Sequence[str] = ()) -> None:
        if not rows:
            raise ConfigError("augmentation: reshape.rows is empty; give at least one mapping of field to template")
        self.rows = [
            {name: _maker(name, value, f"augmentation: reshape.rows[{number}].{name}") for name, value in row.items()}
            for number, row in enumerate(rows)
        ]
        self.drop = list(drop)
        for name in self.drop:
            _check(name, "augmentation: reshape.drop")

    def __call__(self, examples: Iterable[Example]) -> Iterator[Example]:
        for rows in groups(examples):
            made: list[list[Example]] = [[] for _ in self.rows]
            for row in rows:
                try:
                    found = [self._made(row, number) for number in range(len(self.rows))]
                except BadRow as error:
                    self.desk.aside(row, error.reason, str(error))
                    continue
                for shapes, one in zip(made, found, strict=True):
                    shapes.append(one)
            for shapes in made:
                yield from shapes

    def _made(self, row: Example, number: int) -> Example:
        values = variables(row)
        given = {name: make(values) for name, make in self.rows[number].items()}
        found: dict[str, Any] = dict.fromkeys(self.drop) | given
        meta = {name: value for name, value in row.meta.items() if f"meta.{name}" not in found}
        meta |= {name[5:]: value for name, value in found.items() if name.startswith("meta.") and value is not None}
        fields = {name: value for name, value in found.items() if not name.startswith("meta.")}
        for name, default in (("domain", row.domain), ("weight", 1.0)):
            if name in fields and fields[name] is None:
                fields[name] = default
        if row.group is not None and number and "group" not in fields:
            fields["group"] = f"{row.group}/{number}"
        made = replace(row, **fields, meta=meta)
        _check_form(made)
        return made


def _maker(name: str, value: Any, where: str) -> Callable[[Mapping[str, Any]], Any]:
    """What makes a field of a row's variables. Raises ConfigError."""
    _check(name, where)
    if value is None:
        return lambda values: None
    if name == "messages" and isinstance(value, Sequence) and not isinstance(value, str):
        turns = [(str(turn["role"]), template(turn["content"], where=where)) for turn in value]
        return lambda values: [{"role": role, "content": rendered(one, values, where).strip()} for role, one in turns]
    if name in ("score", "weight"):
        source = match["expression"] if (match := ALONE.fullmatch(str(value).strip())) else str(value)
        number = Expression(source, where=where)
        return lambda values: _number(number(values), where)
    if (name == "messages" or name.startswith("meta.")) and (match := ALONE.fullmatch(str(value).strip())):
        return Expression(match["expression"], where=where)
    if name == "messages":
        raise ConfigError(f"{where}: give a list of role and content, or one expression, such as {{{{ meta.chat }}}}")
    text = template(value, where=where)
    return lambda values: rendered(text, values, where).strip() or None


def _check(name: str, where: str) -> None:
    if name not in FIELDS and not (name.startswith("meta.") and len(name) > 5):
        raise ConfigError(f"{where}: a row has no {name}; it has {', '.join(FIELDS)} and meta.NAME")


def _number(value: Any, where: str) -> float | None:
    try:
        return None if value is None else float(value)
    except (TypeError, ValueError, OverflowError):
        raise BadRow("no number", f"{where} gives no number") from None


def _check_form(row: Example) -> None:
    """Raises BadRow where a row has two forms, or none; a prompt may still be without its response."""
    given = {name for name in CONTENT if getattr(row, name) is not None} - {"teacher_prompt"}
    allowed = [set(fields) for fields in FORMS.values()] + [{"prompt"}]
    if row.messages is not None and not is_chat(row.messages):
        raise BadRow("no messages", "messages are no list of role and content with an assistant's")
    if given not in allowed:
        raise BadRow("no form", f"the row has {' and '.join(sorted(given)) or 'no content'}; drop or set fields")
