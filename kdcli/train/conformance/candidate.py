"""An objective under test, what a check measures, and the chunk of logits that checks look at.

Letters: N targets, V vocabulary.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdcli.api import Batch, Need, Objective, StudentOutput, TeacherSignal, TopK, Unit
from kdcli.errors import ConfigError
from kdcli.train.conformance import oracles

Oracle = Callable[..., float]  # (y [V], z [V], target, **settings) -> nats


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
    oracle: Oracle | None = None  # the formula, independently written

    @classmethod
    def of(cls, kind: type[Objective], *, name: str = "", make: Any = None, **settings: Any) -> Candidate:
        """A candidate of a class. Its oracle is the one of kdcli.train.conformance.oracles with the name of its
        module, or, for a class from elsewhere, its static method `oracle`, if it has one."""
        module = kind.__module__
        known = getattr(oracles, module.rpartition(".")[2], None) if module.startswith("kdcli.objective.") else None
        plain = make or (lambda **changes: kind(**{**settings, **changes}))

        def seeded(**changes: Any) -> Objective:  # every instance begins with the same random parameters
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                return plain(**changes)

        return cls(
            name=name or kind.__name__,
            make=seeded,
            settings=_settings(kind, settings),
            oracle=getattr(kind, "oracle", known),
        )

    def claims(self, what: str) -> bool:
        """Whether the objective says this of itself: zero_at_teacher, f_divergence or stops_gradient."""
        return bool(getattr(self.make(), what, False))

    def require(self, what: str, otherwise: str) -> None:
        if not self.claims(what):
            raise NotApplicable(otherwise)

    def numbers(self) -> list[str]:
        """Settings that are real numbers and belong to the formula."""
        kept = ("weight", "temperature")
        return [n for n, v in self.settings.items() if n not in kept and isinstance(v, float)]

    def variants(self) -> Iterator[dict[str, Any]]:
        """Settings as composed, then with other temperatures, and with each number changed: what it accepts of them."""
        yield {}
        for name in (*self.numbers(), *(["temperature"] if "temperature" in self.settings else [])):
            for value in (0.0, 0.3, 1.0, 2.0):
                if self.accepts({name: value}):
                    yield {name: value}

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

    def unsupported(self) -> str | None:
        """Why no check can be run on this objective, or None."""
        objective = self.make()
        if objective.unit is not Unit.TOKEN:
            return "it is not a loss per target"
        other = objective.needs & ~(Need.DISTRIBUTION | Need.LOGITS | Need.LOGPROBS)
        return f"it needs the teacher's {str(other.name).lower()}" if other else None


def _settings(kind: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """Every setting with its value; a whole number stands for a real one where the default is real."""
    defaults = _defaults(kind)
    real = {n: float(v) for n, v in given.items() if type(v) is int and isinstance(defaults.get(n), float)}
    return {**defaults, **given, **real}


def _defaults(kind: type) -> dict[str, Any]:
    """The defaults of a constructor, and of its base's where it hands `**settings` on."""
    found: dict[str, Any] = {}
    for base in kind.__mro__:
        if "__init__" in vars(base):
            parameters = inspect.signature(base.__init__).parameters.values()
            found |= {p.name: p.default for p in parameters if p.default is not p.empty and p.name not in found}
            if not any(p.kind is p.VAR_KEYWORD for p in parameters):
                break
    return found


@dataclass(frozen=True)
class Chunk:
    """N targets as a token objective sees them: logits [1, N, V] of teacher and student."""

    batch: Batch
    y: Tensor
    z: Tensor

    def moved(self, y: Tensor | None = None, z: Tensor | None = None) -> Chunk:
        return replace(self, y=self.y if y is None else y, z=self.z if z is None else z)

    def part(self, window: slice) -> Chunk:
        """The targets of `window` alone."""
        names = ("input_ids", "targets", "mask", "attention_mask", "segment")
        batch = replace(self.batch, **{name: getattr(self.batch, name)[:, window] for name in names})
        return Chunk(batch, self.y[:, window], self.z[:, window])

    def to(self, dtype: torch.dtype) -> Chunk:
        return self.moved(self.y.to(dtype), self.z.to(dtype))

    def signal(self) -> TeacherSignal:
        logprobs = torch.log_softmax(self.y, -1).gather(-1, self.batch.targets.unsqueeze(-1)).squeeze(-1)
        return TeacherSignal(logits=self.y, logprobs=logprobs)

    def sparse(self, k: int, temperature: float, order: Tensor | None = None) -> TeacherSignal:
        """The teacher's K likeliest ids only, in the given order."""
        logprobs, ids = torch.log_softmax(self.y / temperature, -1).topk(k)
        if order is not None:
            logprobs, ids = logprobs[..., order], ids[..., order]
        return TeacherSignal(topk=TopK(ids=ids, logprobs=logprobs, temperature=temperature))


def chunk(*, seed: int = 5, targets: int = 9, vocab: int = 19, spread: float = 2.0) -> Chunk:
    """Random float64 logits with this standard deviation."""
    generator = torch.Generator().manual_seed(seed)
    y, z = (spread * torch.randn(1, targets, vocab, generator=generator, dtype=torch.float64) for _ in range(2))
    ids = torch.randint(0, vocab, (1, targets + 1), generator=generator)
    following = ids[:, 1:].clone()
    third = targets // 3  # models are often sure of the target: of a third the teacher, of another the student
    following[:, :third] = y[:, :third].argmax(-1)
    following[:, third : 2 * third] = z[:, third : 2 * third].argmax(-1)
    everywhere = torch.ones(1, targets, dtype=torch.bool)
    return Chunk(
        Batch(
            input_ids=ids[:, :-1],
            targets=following,
            mask=everywhere,
            attention_mask=everywhere,
            segment=torch.zeros(1, targets, dtype=torch.int64),
            weight=torch.ones(1),
            row=["row"],
            domain=["default"],
            group=[None],
            score=[None],
        ),
        y,
        z,
    )


def value(objective: Objective, at: Chunk, teacher: TeacherSignal | None = None) -> Tensor:
    """Values [1, N] through `forward`."""
    return objective(at.batch, StudentOutput(logits=at.z), teacher or at.signal()).detach()


def by_autograd(objective: Objective, at: Chunk, teacher: TeacherSignal | None = None) -> tuple[Tensor, Tensor]:
    """Values [1, N] and gradient [1, N, V] through `forward`."""
    leaf = at.z.detach().clone().requires_grad_()
    values = objective(at.batch, StudentOutput(logits=leaf), teacher or at.signal())
    (gradient,) = torch.autograd.grad(values.sum(), leaf)
    return values.detach(), gradient


def by_closed_form(objective: Objective, at: Chunk) -> tuple[Tensor, Tensor] | None:
    """Values and gradient through `closed_form`, called as the Distiller calls it; None where there is none."""
    with torch.no_grad():
        return objective.closed_form(at.batch, StudentOutput(logits=at.z.clone()), at.signal())


def by_every_path(objective: Objective, at: Chunk) -> list[tuple[Tensor, Tensor]]:
    """Values and gradient by autograd, and by the closed form where there is one."""
    closed = by_closed_form(objective, at)
    return [by_autograd(objective, at), *([closed] if closed is not None else [])]


def by_oracle(candidate: Candidate, at: Chunk, changes: Mapping[str, Any]) -> Tensor:
    """Values [1, N] of the independent formula."""
    assert candidate.oracle is not None
    temperature, scale = candidate.scale(changes)
    settings = {**candidate.settings, **changes}
    read = {n: settings[n] for n in inspect.signature(candidate.oracle).parameters if n in settings}
    y, z = (logits[0].double().numpy() / temperature for logits in (at.y, at.z))
    targets = at.batch.targets[0].tolist()
    with np.errstate(all="ignore"):
        values = [scale * candidate.oracle(a, b, t, **read) for a, b, t in zip(y, z, targets, strict=True)]
    return torch.tensor([values], dtype=torch.float64)


def distance(one: Tensor, other: Tensor) -> float:
    """max |one - other| relative to the larger of 1 and max |other|; infinite where either is not finite."""
    difference = (one.double() - other.double()).abs()
    if not difference.numel():
        return 0.0
    if not bool(torch.isfinite(difference).all()):
        return math.inf
    return float(difference.max() / other.double().abs().max().clamp(min=1.0))
