"""Checks of what an objective returns for a micro-batch, or for a chunk of one. The first line of a docstring is the
claim.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kdcli.api import Objective, Scope, Unit
from kdcli.train.conformance import records
from kdcli.train.conformance.candidate import EXACT, Candidate, Measure, NotApplicable, distance
from kdcli.train.conformance.case import Case, case, fitted, selected
from kdcli.train.conformance.evaluate import Result, apart, by_every_path, by_oracle, gradients_apart, raw, size, value
from kdcli.train.conformance.variation import kinds, parts, settings_and_spreads

SINGLE = 2e-5  # float32 through a few hundred operations
PER_TARGET = frozenset({"logprobs", "reference_logprobs", "old_logprobs", "hidden", "hidden_states"})


def one_number_per_unit(candidate: Candidate) -> Measure:
    """one finite number for every target, sequence or group that it has a number for, unreduced"""
    at = case(candidate)
    objective = fitted(candidate, at)
    values, kept = raw(objective, at).detach(), selected(objective, at)
    batch = at.batch
    shape = {
        Unit.TOKEN: batch.targets.shape,
        Unit.SEQUENCE: (batch.num_sequences,),
        Unit.GROUP: (int(batch.groups().max()) + 1,),
    }[objective.unit]
    whole = tuple(values.shape) == tuple(kept.shape) == tuple(shape) and kept.dtype is torch.bool
    return Measure(0.0 if whole and bool(kept.any()) and bool(torch.isfinite(values[kept]).all()) else 1.0, 0.0)


def units_are_independent(candidate: Candidate) -> Measure:
    """a unit's number does not depend on what is beside it: on other targets of a chunk, on other sequences but those
    of its group"""
    error = 0.0
    for at in kinds(candidate):
        objective = fitted(candidate, at)
        alone = torch.cat([value(objective, part) for part in parts(at)])
        error = max(error, distance(alone, value(objective, at)))
    return Measure(error, EXACT)


def packing_is_padding(candidate: Candidate) -> Measure:
    """sequences behind each other in one row have the numbers of rows of their own"""
    error = 0.0
    for at in kinds(candidate):
        if at.student.logits is not None:
            raise NotApplicable("it sees one target at a time")
        objective = fitted(candidate, at)
        error = max(error, distance(value(objective, at.packed()), value(objective, at)))
    return Measure(error, EXACT)


def equals_oracle(candidate: Candidate) -> Measure:
    """the formula, written a second time in float64 numpy, at several settings and from small to extreme numbers"""
    error = 0.0
    for changes, spread in settings_and_spreads(candidate, 2.0, 0.5, 30.0, 1e4):
        for at in kinds(candidate, changes, spread) if spread == 2.0 else [case(candidate, changes, spread=spread)]:
            objective = fitted(candidate, at, **changes)
            expected = by_oracle(candidate, objective, at, changes)
            if spread <= 2.0 or torch.isfinite(expected).all():  # extreme numbers are too much for plain formulas
                for result in by_every_path(objective, at):
                    error = max(error, distance(result.values, expected))
    return Measure(error, EXACT)


def zero_at_teacher(candidate: Candidate) -> Measure:
    """value and gradient vanish where the student computes what the teacher does"""
    candidate.require("zero_at_teacher", "it does not compare the student with the teacher")
    error = 0.0
    for changes in candidate.variants():
        at = _as_the_teacher(case(candidate, changes, same=True))
        for result in by_every_path(_identity(fitted(candidate, at, **changes)), at):
            error = max(error, size(result))
    return Measure(error, EXACT)


def positive_elsewhere(candidate: Candidate) -> Measure:
    """above zero where student and teacher differ, however little"""
    candidate.require("zero_at_teacher", "it does not compare the student with the teacher")
    error = 0.0
    for changes, spread in itertools.product(candidate.variants(), (0.01, 0.5, 2.0, 10.0)):
        at = case(candidate, changes, seed=6, same=True)
        there = _as_the_teacher(at).leaves()
        at = at.moved({path: there[path] + spread * leaf for path, leaf in at.leaves().items()})
        lowest = -EXACT if changes else EXACT  # at the end of a setting's range it may be zero for all students
        for result in by_every_path(_identity(fitted(candidate, at, **changes)), at):
            values = result.values.nan_to_num(nan=-math.inf)
            # of a sequence's first target there may be nothing to compare: it attends to itself alone
            least = values.min() if at.student.logits is not None else torch.minimum(values.min() + EXACT, values.sum())
            error = max(error, lowest - float(least))
    return Measure(error, 0.0)


def padding_holds_anything(candidate: Candidate) -> Measure:
    """what stands at padding and, per target, at unsupervised ones changes no value and gets no gradient"""
    error = 0.0
    for at in kinds(candidate):
        if at.student.logits is not None:
            raise NotApplicable("it sees supervised targets only")
        objective = fitted(candidate, at)
        other, free = _with_garbage(at, PER_TARGET - {"hidden"} if candidate.claims("reads_prompt") else PER_TARGET)
        (one,), (two,) = by_every_path(objective, at), by_every_path(objective, other)
        inside = {path: torch.where(free[path], 0.0, g) if path in free else g for path, g in two.gradients.items()}
        outside = Result(two.values, {path: torch.where(free[path], two.gradients[path], 0.0) for path in free})
        error = max(error, apart(Result(two.values, inside), one), size(Result(two.values[:0], outside.gradients)))
    return Measure(error, EXACT)


def saturated_inputs(candidate: Candidate) -> Measure:
    """finite in float32, value and gradient, where probabilities are below its smallest number, and as good as inputs
    rounded to float32 allow"""
    error = 0.0
    for changes, spread in settings_and_spreads(candidate, 200.0, 30.0, 1e4):
        at = case(candidate, changes, spread=spread).to(torch.float32)
        wide = at.to(torch.float64)
        objective = fitted(candidate, wide, **changes)
        exact = by_every_path(objective, wide)[0]
        if size(exact) > 1e30:
            continue  # no number of float32
        large = max(float(leaf.abs().max()) for leaf in at.leaves().values()) if at.student.logits is None else 1.0
        allowed = max(1e-5, 30 * _far(by_every_path(objective, _jittered(wide))[0], exact, large))
        for result in by_every_path(fitted(candidate, at, **changes), at):
            error = max(error, _far(result, exact, large) * 1e-5 / allowed)
    return Measure(error, 1e-5)


def float32(candidate: Candidate) -> Measure:
    """float32 inputs lose no more than float32 must, of a chunk on a vocabulary of 1,000"""
    sizes: dict[str, Any] = {"vocab": 1000, "targets": 5} if candidate.example.scope is Scope.CHUNK else {}
    if candidate.example.cross_tokenizer:
        sizes.pop("vocab", None)
    at = case(candidate, spread=4.0, **sizes).to(torch.float32)
    wide = at.to(torch.float64)
    exact = by_every_path(fitted(candidate, wide), wide)[0]
    error = 0.0
    for result in by_every_path(fitted(candidate, at), at):
        error = max(error, _far(result, exact))
    return Measure(error, SINGLE)


def _as_the_teacher(at: Case) -> Case:
    """A student that computes what the teacher does."""
    theirs = records.numbers(at.teacher)
    scored = theirs.get("own_logprobs", theirs.get("reference_logprobs"))
    theirs = {"logprobs": scored, "hidden": theirs.get("own_hidden"), **theirs}
    return at.moved({path: known for path in at.leaves() if (known := theirs.get(path)) is not None})


def _identity(objective: Objective) -> Objective:
    """With projections that change nothing, where the objective learns some."""
    with torch.no_grad():
        for parameter in objective.parameters():
            if parameter.dim() != 2 or parameter.shape[0] != parameter.shape[1]:
                raise NotApplicable("what it learns cannot be set so that nothing changes")
            parameter.copy_(torch.eye(len(parameter)))
    return objective


def _with_garbage(at: Case, per_target: Collection[str]) -> tuple[Case, dict[str, Tensor]]:
    """The case with large numbers where nothing may be read, and where that is in what the student computed: at
    padding, and of what is `per_target` at unsupervised ones too."""
    generator = torch.Generator().manual_seed(9)
    batch, view = at.batch, at.batch.teacher
    padding, unread = ~batch.attention_mask, ~batch.mask
    free: dict[str, Tensor] = {}

    def spoiled(path: str, tensor: Tensor, own: bool) -> Tensor:
        name = path.split(".")[0]
        if name in ("head", "embedding", "reward", "weight") or (own and name == "logprobs"):
            return tensor  # the student's log-probabilities are 0 where nothing is supervised
        where = unread if name in per_target else padding
        if name.startswith("own_") and view is not None and view.mask is not None:
            where = ~view.mask if name == "own_logprobs" else ~view.attention_mask
        if name == "attentions":
            where = padding[:, None, :, None].expand_as(tensor)  # rows that attend; nobody attends to padding
        where = where.reshape(*where.shape, *[1] * (tensor.dim() - where.dim())).expand_as(tensor)
        if own:
            free[path] = where
        return torch.where(where, 100 * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype), tensor)

    changed = replace(
        at,
        batch=replace(
            records.mapped(batch, lambda path, t: spoiled(path, t, False)),
            targets=torch.where(batch.mask, batch.targets, -100),
        ),
        student=records.mapped(at.student, lambda path, t: spoiled(path, t, True)),
        teacher=records.mapped(at.teacher, lambda path, t: spoiled(path, t, False)),
    )
    return changed, free


def _jittered(at: Case) -> Case:
    """Every number moved by half a step of float32."""
    generator = torch.Generator().manual_seed(11)

    def moved(_: str, tensor: Tensor) -> Tensor:
        return tensor * (1 + 6e-8 * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype))

    return replace(at, student=records.mapped(at.student, moved), teacher=records.mapped(at.teacher, moved))


def _far(result: Result, exact: Result, large: float = 1.0) -> float:
    """Distance of values, and of gradients: those relative to the values, whose differences they are, and to `large`
    numbers that they are products of."""
    largest = torch.cat([exact.values.abs(), exact.values.new_tensor([large])]).max()
    one, other = ({n: g / largest for n, g in r.gradients.items()} for r in (result, exact))
    apart = gradients_apart(Result(result.values, one), Result(exact.values, other))
    return max(distance(result.values, exact.values), apart)
