"""Values and gradients of an objective on a case, by each path that a run may take, and by the independent formula."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kdcli.api import Need, Objective, Scope, StudentOutput
from kdcli.errors import ConfigError
from kdcli.train.conformance import records
from kdcli.train.conformance.arithmetic import backward, float64
from kdcli.train.conformance.candidate import Candidate, NotApplicable, distance
from kdcli.train.conformance.case import Case, chunk, selected

Leaves = dict[str, Tensor]


class Result(NamedTuple):
    """What an objective says of the units that it has a number for, [units], and the gradient of their sum."""

    values: Tensor
    gradients: Leaves  # by path: what the student computed, then `parameters.NAME` of the objective itself


def raw(objective: Objective, at: Case) -> Tensor:
    """What `forward` returns, with a graph."""
    with _as_a_run_does(at):
        return objective(at.batch, at.student, at.teacher)


def value(objective: Objective, at: Case) -> Tensor:
    """Values [units] through `forward`."""
    return raw(objective, at)[selected(objective, at)].detach()


def by_autograd(objective: Objective, at: Case) -> Result:
    """Values and gradients through `forward`."""
    with _as_a_run_does(at):
        student = records.mapped(at.student, lambda _, tensor: tensor.detach().clone().requires_grad_())
        leaves = records.numbers(student)
        leaves |= {f"parameters.{n}": p for n, p in objective.named_parameters() if p.requires_grad}
        values = objective(at.batch, student, at.teacher)[selected(objective, at)]
        gradients = backward(values, list(leaves.values()))
    return Result(values.detach(), dict(zip(leaves, gradients, strict=True)))


def by_closed_form(objective: Objective, at: Case) -> Result | None:
    """Values and gradient through `closed_form`, called as the Distiller calls it; None where there is none."""
    if at.student.logits is None:
        return None
    with torch.no_grad(), _as_a_run_does(at):
        closed = objective.closed_form(at.batch, StudentOutput(logits=at.z.clone()), at.teacher)
    if closed is None:
        return None
    kept = selected(objective, at)
    return Result(closed[0][kept], {"logits": closed[1] * kept.unsqueeze(-1)})


def by_every_path(objective: Objective, at: Case) -> list[Result]:
    """Values and gradients by autograd, and by the closed form where there is one."""
    closed = by_closed_form(objective, at)
    return [by_autograd(objective, at), *([closed] if closed is not None else [])]


def by_oracle(candidate: Candidate, objective: Objective, at: Case, changes: Mapping[str, Any]) -> Tensor:
    """Values [units] of the independent formula, NaN where plain float64 arithmetic gives none."""
    oracle = candidate.oracle
    if oracle is None:
        raise NotApplicable("no second formula is known; give the class a static method `oracle`")
    settings = {**candidate.settings, **changes}
    wanted = inspect.signature(oracle).parameters
    read = {n: settings[n] for n in wanted if n in settings}
    if "tokenizers" in wanted:
        read["tokenizers"] = at.tokenizers
    if "parameters" in wanted:
        read["parameters"] = {n: p.detach().numpy() for n, p in objective.named_parameters()}
    kept = selected(objective, at)
    try:
        with np.errstate(all="ignore"):
            if "batch" in wanted:
                values = np.asarray(oracle(*map(records.plain, (at.batch, at.student, at.teacher)), **read))
            else:
                temperature, scale = candidate.scale(changes)
                y, z = (logits[0].double().numpy() / temperature for logits in (at.y, at.z))
                targets = at.batch.targets[0].tolist()
                values = np.array([[scale * oracle(a, b, t, **read) for a, b, t in zip(y, z, targets, strict=True)]])
    except (ArithmeticError, ValueError):
        return torch.full((int(kept.sum()),), math.nan, dtype=torch.float64)
    return torch.as_tensor(values, dtype=torch.float64)[kept]


def takes_top_k(candidate: Candidate) -> bool:
    """Whether the objective reads a teacher that gives its likeliest ids only."""
    objective = candidate.make()
    if not objective.needs & Need.DISTRIBUTION or objective.scope is not Scope.CHUNK or objective.cross_tokenizer:
        return False
    at = chunk(objective, targets=1)
    try:
        value(objective, at.sparse(3, getattr(objective, "temperature", 1.0)))
    except ConfigError:
        return False
    return True


def apart(one: Result, other: Result) -> float:
    """The largest distance of values and of gradients."""
    return max(distance(one.values, other.values), gradients_apart(one, other))


def gradients_apart(one: Result, other: Result) -> float:
    return max((distance(g, other.gradients[n]) for n, g in one.gradients.items() if n in other.gradients), default=0.0)


def size(result: Result) -> float:
    """The largest number in values and gradients; infinite where one is not finite."""
    zeros = Result(torch.zeros_like(result.values), {n: torch.zeros_like(g) for n, g in result.gradients.items()})
    return apart(result, zeros)


def _as_a_run_does(at: Case) -> AbstractContextManager[None]:
    """In float64 all through, where the case is."""
    return float64() if next(iter(at.leaves().values())).dtype is torch.float64 else nullcontext()
