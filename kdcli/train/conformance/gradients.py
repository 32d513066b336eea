"""Checks of an objective's gradient with respect to what the student computed, and to its own parameters."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from kdcli.api import Objective, Scope
from kdcli.train.conformance import records
from kdcli.train.conformance.arithmetic import Detached, float64
from kdcli.train.conformance.candidate import Candidate, Measure, NotApplicable, distance
from kdcli.train.conformance.case import Case, case, fitted, selected
from kdcli.train.conformance.evaluate import Leaves, apart, by_autograd, by_closed_form, takes_top_k

STEP = 1e-5
DIRECTIONS = 3  # random ones, of each tensor: a wrong entry shows in each


def finite_differences(candidate: Candidate) -> Measure:
    """the gradient is the slope of the value (of the value with its detached parts fixed, where it declares some)"""
    error = 0.0
    for changes in candidate.variants():
        at = case(candidate, changes)
        objective = fitted(candidate, at, **changes)
        slope = _Slope(objective, at)
        _, gradients = by_autograd(objective, at)
        if objective.scope is Scope.CHUNK:
            error = max(error, distance(gradients.pop("logits"), slope.of_logits()))
        generator = torch.Generator().manual_seed(1)
        for paths in _together(gradients, once=bool(changes)):
            direction = {path: _direction(at, path, gradients[path], generator) for path in paths}
            expected = torch.stack([(gradients[path] * move).sum() for path, move in direction.items()]).sum()
            error = max(error, distance(expected, slope.along(direction).sum()))
    return Measure(error, 1e-6)  # a step of 1e-5: its square, and float64's resolution over it


def closed_form_is_autograd(candidate: Candidate) -> Measure:
    """the closed form equals what autograd derives from the value, for a top-k teacher too"""
    if candidate.example.scope is not Scope.CHUNK:
        raise NotApplicable("it has no closed form")
    error, found = 0.0, False
    for changes in candidate.variants():
        at = case(candidate, changes)
        objective = fitted(candidate, at, **changes)
        temperature = getattr(objective, "temperature", 1.0)
        sparse = [at.sparse(k, temperature) for k in (1, 5)] if takes_top_k(candidate) else []
        for one in (at, *sparse):
            closed = by_closed_form(objective, one)
            if closed is not None:
                found, error = True, max(error, apart(closed, by_autograd(objective, one)))
    if not found:
        raise NotApplicable("it has no closed form")
    return Measure(error, 1e-9)


def _together(gradients: Leaves, once: bool) -> list[list[str]]:
    """Which tensors to move at a time: each by itself, several times or once, and those without a gradient at once."""
    still = [path for path, gradient in gradients.items() if not gradient.any()]
    moving = [[path] for path in gradients if path not in still]
    return moving * (1 if once else DIRECTIONS) + ([still] if still else [])


def _direction(at: Case, path: str, like: Tensor, generator: torch.Generator) -> Tensor:
    direction = torch.randn(like.shape, generator=generator, dtype=torch.float64)
    if path == "logprobs":
        return direction * at.batch.mask  # elsewhere they are 0, and nothing flows back
    if path.startswith("attentions"):
        return direction * at.leaves()[path]  # a step must be small beside a probability
    return direction


class _Slope:
    """Central differences of an objective's values; what it detaches is held fixed where it declares such parts."""

    def __init__(self, objective: Objective, at: Case) -> None:
        self.objective, self.at = objective, at
        self.kept = selected(objective, at)
        self.own = dict(objective.named_parameters())
        self.tape: list[Any] | None = None
        if getattr(objective, "stops_gradient", False):
            tape: list[Any] = []
            self._values({}, Detached(tape, replay=False))
            assert tape, "it says that it stops gradients, and detaches nothing"
            self.tape = tape

    def along(self, direction: dict[str, Tensor]) -> Tensor:
        """Slope of each unit's value, [units], along a direction in some tensors."""
        ends = []
        for sign in (1, -1):
            mode = nullcontext() if self.tape is None else Detached(self.tape, replay=True)
            ends.append(self._values({n: sign * STEP * d for n, d in direction.items()}, mode))
        return (ends[0] - ends[1]) / (2 * STEP)

    def of_logits(self) -> Tensor:
        """[1, N, V]: of all targets at once, one id at a time."""
        slopes = torch.zeros_like(self.at.z)
        for v in range(slopes.shape[-1]):
            direction = torch.zeros_like(slopes)
            direction[..., v] = 1.0
            slopes[..., v][self.kept] = self.along({"logits": direction})
        return slopes

    def _values(self, moves: dict[str, Tensor], mode: Any) -> Tensor:
        def moved(path: str, tensor: Tensor) -> Tensor:
            return (tensor + moves[path] if path in moves else tensor.clone()).requires_grad_()

        student = records.mapped(self.at.student, moved)
        kept = {name: parameter.data for name, parameter in self.own.items()}
        for name, parameter in self.own.items():
            if f"parameters.{name}" in moves:
                parameter.data = parameter.data + moves[f"parameters.{name}"]
        try:
            with torch.enable_grad(), float64(), mode:
                values = self.objective(self.at.batch, student, self.at.teacher)
            return values[self.kept].detach()
        finally:
            for name, parameter in self.own.items():
                parameter.data = kept[name]
