"""Prompts as files: Jinja templates, the paper they follow, and how answers are read. See docs/augmentation.md."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import jinja2
import jinja2.meta
import xxhash
import yaml

from kdcli.api import Example
from kdcli.errors import ConfigError
from kdcli.store import paths
from kdcli.store.examples import BadRow
from kdcli.text.parse import Parser
from kdcli.text.sandbox import Sandbox

ROW = frozenset(f.name for f in fields(Example)) - {"where"}  # names a template may use
T = TypeVar("T")
KEYS = ("paper", "system", "turns", "user", "student", "parse", "example")


class Prompt:
    """One prompt file.

    `system`, `user` and the contents of `turns` ([{role, content}] between the two) are Jinja templates over the row's
    fields and the `extra` names that a step gives; `student` makes the prompt that the student will see of the same
    (null: the row's own). `parse` says how an answer becomes fields, `example` is an answer as it should be.
    `where` begins messages. Raises ConfigError naming file and key.
    """

    def __init__(self, content: Mapping[str, Any], *, name: str, where: str, extra: Iterable[str] = ()) -> None:
        self.name, self.where = name, where
        self.content = dict(content)
        self.allowed = ROW | set(extra)
        if unknown := [key for key in content if key not in KEYS]:
            raise ConfigError(f"{where}: {name} has no key {unknown[0]}; the keys are {', '.join(KEYS)}")
        if missing := [key for key in ("paper", "user", "parse", "example") if not content.get(key)]:
            raise ConfigError(f"{where}: {name} lacks {', '.join(missing)}")
        self.paper = str(content["paper"])
        self.parser = Parser(content["parse"], where=f"{where}: {name}: parse")
        self.example = str(content["example"])
        self.parser(self.example)  # raises BadRow: an example that does not parse is a broken file
        turns = content.get("turns") or []
        parts = [("system", content["system"])] if content.get("system") else []
        parts += [(turn["role"], turn["content"]) for turn in turns]
        parts.append(("user", content["user"]))
        self._parts = [(role, self._part(str(source))) for role, source in parts]
        self._student = self._template(content["student"]) if content.get("student") else None

    @classmethod
    def load(cls, name: str, *, where: str, extra: Iterable[str] = ()) -> Prompt:
        """A prompt by its name (`label/answer`, in ./configs/prompt or the packaged ones) or by the path of a file."""
        file = find(name, where)
        try:
            content = yaml.safe_load(file.read_text("utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"{where}: {file} cannot be read ({' '.join(str(error).split())[:200]})") from None
        if not isinstance(content, dict):
            raise ConfigError(f"{where}: {file} is no mapping of {', '.join(KEYS)}")
        try:
            return cls(content, name=name, where=where, extra=extra)
        except BadRow as error:
            raise ConfigError(f"{where}: {name}: its example does not parse: {error}") from None

    @cached_property
    def hash(self) -> str:
        """Of the content: equal templates and parsers, equal hash."""
        return xxhash.xxh3_128_hexdigest(json.dumps(self.content, sort_keys=True, ensure_ascii=False).encode())

    def messages(self, example: Example, **extra: Any) -> list[dict[str, str]]:
        """The chat that asks about `example`. Raises BadRow where the row lacks a field that the template names."""
        values = variables(example) | extra
        return [
            {"role": role, "content": part if isinstance(part, str) else self._rendered(part, values).strip()}
            for role, part in self._parts
        ]

    def for_student(self, example: Example, **extra: Any) -> str | None:
        """The prompt that the student will see, or None for the row's own."""
        return None if self._student is None else self._rendered(self._student, variables(example) | extra).strip()

    def _part(self, source: str) -> jinja2.Template | str:
        """A template, or the text itself where nothing in it depends on the row."""
        part = self._template(source)
        return part if any(mark in source for mark in ("{{", "{%", "{#")) else source.strip()

    def _template(self, source: Any) -> jinja2.Template:
        return template(source, where=f"{self.where}: {self.name}", names=self.allowed)

    def _rendered(self, template: jinja2.Template, values: Mapping[str, Any]) -> str:
        return rendered(template, values, self.name)


ENVIRONMENT = Sandbox()


def template(source: Any, *, where: str, names: Collection[str] = ROW) -> jinja2.Template:
    """A Jinja template over `names`. Raises ConfigError for broken syntax, and for a name that is not among them."""
    try:
        _check_names(ENVIRONMENT.parse(str(source)), names, where)
        return ENVIRONMENT.from_string(str(source))
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"{where}: line {error.lineno}: {error.message}") from None


class Expression:
    """A Jinja expression over `names`, such as `score >= 4 and meta.correct is defined`. Raises ConfigError for broken
    syntax, and for a name that is not among them."""

    def __init__(self, source: Any, *, where: str, names: Collection[str] = ROW) -> None:
        self.source, self.where = str(source), where
        try:
            _check_names(ENVIRONMENT.parse(f"{{{{ {self.source} }}}}"), names, where)
            self._value = ENVIRONMENT.compile_expression(self.source, undefined_to_none=False)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"{where}: {self.source!r} is no expression: {error.message}") from None

    def __call__(self, values: Mapping[str, Any]) -> Any:
        """Its value. Raises BadRow where `values` lacks what it names (`meta.X is defined` asks first)."""
        return _guarded(lambda: self._known(self._value(values)), self.where)

    def holds(self, values: Mapping[str, Any]) -> bool:
        """Whether it is true of `values`. Raises BadRow like a call."""
        return bool(self(values))

    @staticmethod
    def _known(value: Any) -> Any:
        if isinstance(value, jinja2.Undefined):
            bool(value)  # a strict one raises UndefinedError, which names what is missing
        return value


def _check_names(tree: Any, names: Collection[str], where: str) -> None:
    if unknown := sorted(jinja2.meta.find_undeclared_variables(tree) - set(names) - ENVIRONMENT.globals.keys()):
        raise ConfigError(
            f"{where} names {', '.join(unknown)}, which no row has; other columns of the data are meta.NAME, and there "
            f"are {', '.join(sorted(names))}"
        )


def rendered(template: jinja2.Template, values: Mapping[str, Any], name: str) -> str:
    """A template over values. Raises BadRow where a value is missing, or the sandbox refuses."""
    return _guarded(lambda: ENVIRONMENT.finished(template, values), name)


def _guarded(make: Callable[[], T], name: str) -> T:
    try:
        return make()
    except jinja2.UndefinedError as error:
        raise BadRow("lacks a field", f"{name}: {error.message}") from None
    except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
        raise BadRow("template failed", f"{name}: {type(error).__name__}: {error}") from None


def variables(example: Example) -> dict[str, Any]:
    """What templates see of a row: the fields that it has."""
    return {name: value for name in ROW if (value := getattr(example, name)) is not None}


def find(name: str, where: str) -> Path:
    """The file of a prompt. Raises ConfigError that lists what there is."""
    if name.endswith((".yaml", ".yml")):
        return paths.resolve(name)
    for root in folders():
        file = (root / f"{name}.yaml").resolve()
        if file.is_file() and file.is_relative_to(root.resolve()):
            return file
    near = [one for one in names() if one.split("/")[0] == name.split("/")[0]] or names()
    raise ConfigError(f"{where}: there is no prompt {name}; there are {', '.join(near)}, or give the path of a file")


def folders() -> Sequence[Path]:
    """Where prompts lie, the user's own first."""
    return Path("configs/prompt"), paths.configs() / "prompt"


def names() -> list[str]:
    """All prompts by name."""
    found = {f.relative_to(root).with_suffix("").as_posix() for root in folders() for f in root.rglob("*.yaml")}
    return sorted(found)
