"""Checks of how an objective treats the logits of both models: their ids, offset and temperature, and a teacher that
gives its likeliest ids only.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kdcli.api import Need, Objective, Scope
from kdcli.train.conformance import records
from kdcli.train.conformance.candidate import EXACT, Candidate, Measure, NotApplicable, distance
from kdcli.train.conformance.case import Case, case, fitted
from kdcli.train.conformance.evaluate import Result, apart, by_every_path, takes_top_k, value


def vocabulary_order(candidate: Candidate) -> Measure:
    """renaming the ids permutes the gradient and leaves the value"""
    at = case(candidate)
    at = at if candidate.example.scope is Scope.CHUNK else case(candidate, foreign=False)
    objective = fitted(candidate, at)
    if at.tokenizers[0] is not at.tokenizers[1]:
        raise NotApplicable("the ids of two tokenizers are not each other's")
    if candidate.claims("draws"):
        raise NotApplicable("it draws ids at random, by their order")
    vocab = at.z.shape[-1] if at.student.logits is not None else at.shapes[0].vocab_size
    order = torch.randperm(vocab, generator=torch.Generator().manual_seed(2))
    new_id = torch.argsort(order)
    renamed = replace(at.batch, targets=new_id[at.batch.targets], input_ids=new_id[at.batch.input_ids])
    other = replace(_reordered(at, order), batch=renamed)
    error = 0.0
    for one, two in zip(by_every_path(objective, at), by_every_path(objective, other), strict=True):
        expected = {path: _rows_in_order(path, gradient, order) for path, gradient in one.gradients.items()}
        error = max(error, apart(two, Result(one.values, expected)))
    return Measure(error, EXACT)


def logit_offset(candidate: Candidate) -> Measure:
    """a constant added to all logits of a target changes nothing, so their gradient sums to zero"""
    at = case(candidate)
    objective = fitted(candidate, at)
    _require_logits(at)
    moved = {path: leaf + 7.0 for path, leaf in at.leaves().items() if path in ("logits", "head.bias")}
    theirs = records.numbers(at.teacher)
    other = at.moved(moved, {path: leaf - 3.0 for path, leaf in theirs.items() if path in ("logits", "head.bias")})
    error = 0.0
    for one, two in zip(by_every_path(objective, at), by_every_path(objective, other), strict=True):
        total = torch.stack([one.gradients[path].sum(-1).abs().max() for path in moved])
        error = max(error, apart(two, one), distance(total, torch.zeros_like(total)))
    return Measure(error, EXACT)


def temperature_divides_both_logits(candidate: Candidate) -> Measure:
    """temperature T is the logits of both models divided by T, and nothing else"""
    if "temperature" not in candidate.settings:
        raise NotApplicable("it has no temperature")
    if candidate.example.scope is not Scope.CHUNK and "temperature_scale" not in candidate.settings:
        raise NotApplicable("its temperature is not one of logits")
    _require_soft(candidate)
    plain = {"temperature_scale": "none"} if "temperature_scale" in candidate.settings else {}
    at, error = case(candidate, plain), 0.0
    _require_logits(at)
    divided = ("logits", "head.weight", "head.bias")
    for temperature in (0.7, 3.0):
        hot, cool = (fitted(candidate, at, temperature=t, **plain) for t in (temperature, 1.0))
        student, teacher = (
            {path: leaf / temperature for path, leaf in leaves.items() if path in divided}
            for leaves in (at.leaves(), records.numbers(at.teacher))
        )
        pairs = zip(by_every_path(cool, at.moved(student, teacher)), by_every_path(hot, at), strict=True)
        for one, two in pairs:
            scaled = {n: g * temperature if n in divided else g for n, g in two.gradients.items()}
            error = max(error, apart(Result(two.values, scaled), one))
    return Measure(error, EXACT)


def t2_scales_value_and_gradient(candidate: Candidate) -> Measure:
    """temperature_scale=t2 multiplies value and gradient alike by T squared"""
    if "temperature_scale" not in candidate.settings:
        raise NotApplicable("it has no temperature_scale")
    _require_soft(candidate)
    at = case(candidate)
    plain, scaled = (fitted(candidate, at, temperature=3.0, temperature_scale=s) for s in ("none", "t2"))
    error = 0.0
    for one, two in zip(by_every_path(plain, at), by_every_path(scaled, at), strict=True):
        error = max(error, apart(two, Result(9 * one.values, {n: 9 * g for n, g in one.gradients.items()})))
    return Measure(error, EXACT)


def sparse_teacher(candidate: Candidate) -> Measure:
    """of a top-k teacher, all ids but one, in any order, say the same as all ids"""
    objective, at, temperature = _sparse(candidate)
    vocab = at.z.shape[-1]
    dense = value(objective, at)
    k = vocab - 1 if candidate.settings.get("missing", "tail") == "tail" else vocab
    one = value(objective, at.sparse(k, temperature))
    order = torch.randperm(7, generator=torch.Generator().manual_seed(4))
    error = distance(one, dense)
    for changes in _missing(candidate):
        varied = fitted(candidate, at, **changes)
        seven, mixed = (value(varied, at.sparse(7, temperature, order=o)) for o in (None, order))
        error = max(error, distance(mixed, seven))
    return Measure(error, 1e-6)  # the rest mass is held above 1e-7


def top_k_bound(candidate: Candidate) -> Measure:
    """a top-k teacher gives a value between 0 and the dense one, and closer to it with every k; 0 at the teacher for
    every way to treat what is missing"""
    objective, at, temperature = _sparse(candidate)
    candidate.require("f_divergence", "merging ids may raise it: it is not a sum of q f(p / q)")
    dense, error = value(objective, at), 0.0
    last = torch.zeros_like(dense)
    for k in (1, 2, 4, 8, 12, at.z.shape[-1] - 1):
        values = value(objective, at.sparse(k, temperature))
        error = max(error, float((last - values).max()), float((values - dense).max()))
        last = values
    for changes, k in itertools.product(_missing(candidate), (1, 5)):
        varied = fitted(candidate, at, **changes)
        error = max(error, -float(value(varied, at.sparse(k, temperature)).min()))
        if changes.get("missing") != "teacher_only":  # the teacher's missing mass makes them differ
            there = at.logits(z=at.y)
            error = max(error, float(value(varied, there.sparse(k, temperature)).abs().max()))
    return Measure(error, 1e-6)


def _reordered(at: Case, order: Tensor) -> Case:
    """Both models with their ids in another order."""
    return replace(
        at,
        student=records.mapped(at.student, lambda path, t: _rows_in_order(path, t, order)),
        teacher=records.mapped(at.teacher, lambda path, t: _rows_in_order(path, t, order)),
    )


def _rows_in_order(path: str, tensor: Tensor, order: Tensor) -> Tensor:
    if path == "logits":
        return tensor[..., order]
    if path in ("head.weight", "head.bias", "embedding"):
        return torch.cat([tensor[order], tensor[len(order) :]])
    return tensor


def _require_logits(at: Case) -> None:
    if at.student.logits is None and at.student.head is None:
        raise NotApplicable("it sees no logits")


def _require_soft(candidate: Candidate) -> None:
    if candidate.claims("hard_part"):
        raise NotApplicable("a part of it has no temperature")


def _sparse(candidate: Candidate) -> tuple[Objective, Case, float]:
    """(objective, chunk, its temperature), or NotApplicable where it takes no top-k teacher."""
    if not candidate.example.needs & Need.DISTRIBUTION or candidate.example.scope is not Scope.CHUNK:
        raise NotApplicable("it does not read the teacher's distribution, a chunk of targets at a time")
    if not takes_top_k(candidate):
        raise NotApplicable("it refuses a top-k teacher")
    if candidate.claims("draws"):
        raise NotApplicable("it draws ids at random, and takes a top-k teacher's for drawn ones")
    at = case(candidate)
    objective = fitted(candidate, at)
    return objective, at, getattr(objective, "temperature", 1.0)


def _missing(candidate: Candidate) -> list[dict[str, Any]]:
    return [{"missing": how} for how in candidate.choices["missing"]] if "missing" in candidate.choices else [{}]
