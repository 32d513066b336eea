"""An objective under test: its settings, how to make it with some of them changed, and what a check measures."""

from __future__ import annotations

import importlib.util
import inspect
import math
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from kdcli.api import ModelShape, Objective
from kdcli.errors import ConfigError

Oracle = Callable[..., Any]  # of scope CHUNK: (y [V], z [V], target, **settings) -> nats; else see `plain`
ORACLES = ("oracles", "oracles_tokens", "oracles_features", "oracles_cross", "oracles_sequences")
EXACT = 1e-9  # float64 through a few hundred operations
SMALL = ModelShape(layers=2, width=8, heads=2, kv_heads=1, head_width=4, vocab_size=17)  # the suite's student
LARGE = ModelShape(layers=4, width=16, heads=4, kv_heads=2, head_width=4, vocab_size=17)  # and its teacher
SHARED = ("weight", "domains", "reduction", "vocabulary")  # settings that are not the formula's


@dataclass(frozen=True)
class Measure:
    """A measured error and what it may be at most."""

    error: float
    bound: float


class NotApplicable(Exception):
    """A check does not concern this objective; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """An objective by its name, its settings, and how to make it with some of them changed."""

    name: str
    make: Callable[..., Objective]
    settings: Mapping[str, Any]  # every setting of the constructor, as composed
    choices: Mapping[str, tuple[Any, ...]]  # of settings that are a switch or one of several words
    oracle: Oracle | None = None  # the formula, independently written

    @classmethod
    def of(cls, kind: type[Objective], *, name: str = "", make: Any = None, **settings: Any) -> Candidate:
        """A candidate of a class. Its oracle is the function with the name of its module in one of the modules
        `oracles*` beside this one, or, for a class from elsewhere, its static method `oracle`, if it has one."""
        module = kind.__module__
        known = _oracle(module.rpartition(".")[2]) if module.startswith("kdcli.objective.") else None
        plain = make or (lambda **changes: kind(**{**settings, **changes}))

        def seeded(**changes: Any) -> Objective:  # every instance begins with the same random parameters
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                return plain(**changes)

        return cls(
            name=name or kind.__name__,
            make=seeded,
            settings=_settings(kind, settings),
            choices=_choices(kind),
            oracle=getattr(kind, "oracle", known),
        )

    @cached_property
    def example(self) -> Objective:
        """One instance, to ask what it is; never evaluated."""
        return self.make()

    @cached_property
    def shapes(self) -> tuple[ModelShape, ModelShape]:
        """Of student and teacher: equal where the objective takes no others. Raises ConfigError where it takes none."""
        try:
            self.make().fit(SMALL, LARGE)
        except ConfigError:
            self.make().fit(SMALL, SMALL)
            return SMALL, SMALL
        return SMALL, LARGE

    def claims(self, what: str) -> bool:
        """Whether the objective says this of itself; the package's docstring has all that it may say."""
        return bool(getattr(self.example, what, False))

    def require(self, what: str, otherwise: str) -> None:
        if not self.claims(what):
            raise NotApplicable(otherwise)

    def numbers(self) -> list[str]:
        """Settings that are real numbers and belong to the formula."""
        kept = (*SHARED, "temperature")
        return [n for n, v in self.settings.items() if n not in kept and isinstance(v, float)]

    def variants(self) -> Iterator[dict[str, Any]]:
        """Settings as composed, then with other temperatures, and with each number, switch and word changed, as far as
        the constructor takes it."""
        yield {}
        for name, values in self._varied():
            for value in values:
                if self.accepts({name: value}):
                    yield {name: value}
        if "temperature" in self.settings and "temperature_scale" in self.settings:
            yield {"temperature": 2.0, "temperature_scale": "t2"}

    def accepts(self, changes: Mapping[str, Any]) -> bool:
        """Whether the constructor takes these settings; objectives of users raise what they like."""
        try:
            self.make(**changes)
        except (ConfigError, ValueError, AssertionError):
            return False
        return True

    def scale(self, changes: Mapping[str, Any]) -> tuple[float, float]:
        """(T, factor of the value) with some settings changed."""
        settings = {**self.settings, **changes}
        temperature = settings.get("temperature", 1.0)
        return temperature, temperature**2 if settings.get("temperature_scale") == "t2" else 1.0

    def _varied(self) -> Iterator[tuple[str, tuple[Any, ...]]]:
        for name in (*self.numbers(), *(["temperature"] if "temperature" in self.settings else [])):
            yield name, (0.0, 0.3, 1.0, 2.0)
        for name, values in self.choices.items():
            if name not in SHARED and name in self.settings and name != "temperature_scale":
                yield name, tuple(value for value in values if value != self.settings[name])


def distance(one: Tensor, other: Tensor) -> float:
    """max |one - other| relative to the larger of 1 and max |other|; infinite where either is not finite."""
    difference = (one.double() - other.double()).abs()
    if not difference.numel():
        return 0.0
    if not bool(torch.isfinite(difference).all()):
        return math.inf
    return float(difference.max() / other.double().abs().max().clamp(min=1.0))


def _oracle(name: str) -> Oracle | None:
    for module in ORACLES:
        path = f"{__package__}.{module}"
        if importlib.util.find_spec(path) is not None:
            found = getattr(importlib.import_module(path), name, None)
            if found is not None:
                return found
    return None


def _settings(kind: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """Every setting with its value; a whole number stands for a real one where the default is real."""
    defaults = _defaults(kind)
    real = {n: float(v) for n, v in given.items() if type(v) is int and isinstance(defaults.get(n), float)}
    return {**defaults, **given, **real}


def _defaults(kind: type) -> dict[str, Any]:
    """The defaults of a constructor, and of its base's where it hands `**settings` on."""
    found: dict[str, Any] = {}
    for constructor in _constructors(kind):
        parameters = inspect.signature(constructor).parameters.values()
        found |= {p.name: p.default for p in parameters if p.default is not p.empty and p.name not in found}
    return found


def _choices(kind: type) -> dict[str, tuple[Any, ...]]:
    """The values of each setting that is annotated as a bool or a Literal of several."""
    found: dict[str, tuple[Any, ...]] = {}
    for constructor in _constructors(kind):
        try:
            hints = typing.get_type_hints(constructor)
        except (NameError, TypeError):  # annotations that only a type checker can read
            continue
        for name, hint in hints.items():
            values = (True, False) if hint is bool else typing.get_args(hint) if _is_literal(hint) else ()
            if len(values) > 1:
                found.setdefault(name, values)
    return found


def _is_literal(hint: Any) -> bool:
    return typing.get_origin(hint) is Literal


def _constructors(kind: type) -> Iterator[Callable[..., Any]]:
    """The constructors of a class and its bases, as long as they hand `**settings` on."""
    for base in kind.__mro__:
        constructor = vars(base).get("__init__")
        if constructor is not None:
            yield constructor
            if not any(p.kind is p.VAR_KEYWORD for p in inspect.signature(constructor).parameters.values()):
                return
