"""Checks of an objective's gradient with respect to the student's logits."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from kdcli.api import Objective, StudentOutput
from kdcli.train.conformance.candidate import (
    Candidate,
    Chunk,
    Measure,
    NotApplicable,
    by_autograd,
    by_closed_form,
    chunk,
    distance,
)


def finite_differences(candidate: Candidate) -> Measure:
    """the gradient is the slope of the value (of the value with its detached parts fixed, where it declares some)"""
    error = 0.0
    for changes in candidate.variants():
        objective, at = candidate.make(**changes), chunk()
        _, gradient = by_autograd(objective, at)
        error = max(error, distance(gradient, _slopes(objective, at, getattr(objective, "stops_gradient", False))))
    return Measure(error, 1e-6)  # a step of 1e-5: its square, and float64's resolution over it


def closed_form_is_autograd(candidate: Candidate) -> Measure:
    """the closed form equals what autograd derives from the value"""
    error = 0.0
    for changes in candidate.variants():
        objective, at = candidate.make(**changes), chunk()
        closed = by_closed_form(objective, at)
        if closed is None:
            raise NotApplicable("it has no closed form")
        by_hand, derived = closed, by_autograd(objective, at)
        error = max(error, distance(by_hand[0], derived[0]), distance(by_hand[1], derived[1]))
    return Measure(error, 1e-9)


def _slopes(objective: Objective, at: Chunk, hold: bool, step: float = 1e-5) -> Tensor:
    """Central differences [1, N, V] of all targets at once, one id at a time; `hold` fixes what is detached."""
    tape: list[Tensor] = []
    slopes = torch.empty_like(at.z)

    def values(z: Tensor, mode: AbstractContextManager[Any]) -> Tensor:
        with torch.no_grad(), mode:
            return objective(at.batch, StudentOutput(logits=z), at.signal())

    values(at.z, _Detached(tape, replay=False))
    for v in range(at.z.shape[-1]):
        ends = []
        for sign in (1, -1):
            moved = at.z.clone()
            moved[..., v] += sign * step
            ends.append(values(moved, _Detached(tape, replay=True) if hold else nullcontext()))
        slopes[..., v] = (ends[0] - ends[1]) / (2 * step)
    return slopes


class _Detached(TorchFunctionMode):
    """Records the results of `Tensor.detach` in order, or gives back those recorded."""

    def __init__(self, tape: list[Tensor], replay: bool) -> None:
        super().__init__()
        self.tape, self.replay, self.next = tape, replay, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func not in (Tensor.detach, torch.detach):
            return result
        if self.replay:
            result = self.tape[self.next]
            self.next += 1
        else:
            self.tape.append(result)
        return result
