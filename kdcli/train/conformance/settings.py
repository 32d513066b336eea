"""Checks of an objective's settings and state, and of what it leaves alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kdcli.api import Unit
from kdcli.train.conformance.candidate import EXACT, Candidate, Measure, NotApplicable, distance
from kdcli.train.conformance.case import case, fitted, selected
from kdcli.train.conformance.evaluate import apart, by_every_path, raw, value


def continuous_in_settings(candidate: Candidate) -> Measure:
    """the value has no jump in any number of its settings, their ends and zeros included"""
    names = candidate.numbers()
    if not names:
        raise NotApplicable("it has no numbers to vary")
    at, error, step = case(candidate, spread=1.0), 0.0, 1e-6
    for here in _points(candidate, names):
        if not candidate.accepts(here):
            continue
        center = value(fitted(candidate, at, **here), at)
        for name, sign in itertools.product(names, (-1, 1)):
            near = {**here, name: here[name] + sign * step}
            if candidate.accepts(near):
                error = max(error, distance(value(fitted(candidate, at, **near), at), center))
    return Measure(error, 1e-4)


def settings_are_read_at_use(candidate: Candidate) -> Measure:
    """a number set after construction, as schedules do, is a number given to the constructor"""
    names = [*candidate.numbers(), *(["temperature"] if "temperature" in candidate.settings else [])]
    if not names:
        raise NotApplicable("it has no numbers to schedule")
    error = 0.0
    fixed = [{}, {"temperature_scale": "t2"}] if "temperature_scale" in candidate.settings else [{}]
    for name, number, others in itertools.product(names, (0.3, 1.0, 2.0), fixed):
        if not candidate.accepts({name: number, **others}):
            continue
        at = case(candidate, others)
        late = fitted(candidate, at, **others)
        value(late, at)  # what is computed once and kept would be kept from here
        setattr(late, name, number)
        early = fitted(candidate, at, **{name: number}, **others)
        for one, two in zip(by_every_path(late, at), by_every_path(early, at), strict=True):
            error = max(error, apart(one, two))
    return Measure(error, EXACT)


def weight_and_domains_are_left_alone(candidate: Candidate) -> Measure:
    """weight, domains and reduction are kept for the Distiller and not applied here"""
    at = case(candidate)
    given: dict[str, Any] = {"weight": 0.25, "domains": ["default"]}
    if candidate.example.unit is Unit.TOKEN and "reduction" in candidate.settings:
        given["reduction"] = "sequence"
    objective = fitted(candidate, at, **given)
    kept = objective.weight == 0.25 and tuple(objective.domains) == ("default",)
    kept = kept and objective.reduction == given.get("reduction", "token")
    return Measure(distance(value(objective, at), value(fitted(candidate, at), at)) if kept else 1.0, EXACT)


def inputs_stay_as_they_are(candidate: Candidate) -> Measure:
    """what objectives share is not written into; asked twice, an objective says the same"""
    at = case(candidate)
    objective = fitted(candidate, at)
    temperature = getattr(objective, "temperature", 1.0)
    shared = [*_tensors(at.batch), *_tensors(at.student), *_tensors(at.teacher)]
    if at.student.logits is not None:
        shared += [t for t in (at.teacher.log_p(temperature), at.student.log_q(temperature)) if t is not None]
    before = [tensor.clone() for tensor in shared]
    with torch.no_grad():
        first = raw(objective, at).clone()
        objective.closed_form(at.batch, at.student, at.teacher)
        second = raw(objective, at)
    kept = selected(objective, at)
    return Measure(
        max(distance(second[kept], first[kept]), *(distance(a, b) for a, b in zip(shared, before, strict=True))), 0.0
    )


def state_is_restored(candidate: Candidate) -> Measure:
    """a copy loaded from state_dict() after some use says what the original says"""
    at = case(candidate)
    objective, copy = fitted(candidate, at), fitted(candidate, at)
    for seed in (1, 2, 3):
        value(objective, case(candidate, seed=seed))
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter.mul_(1.5)
    copy.load_state_dict(objective.state_dict())
    return Measure(distance(value(copy, at), value(objective, at)), 0.0)


def _points(candidate: Candidate, names: list[str]) -> Iterator[dict[str, float]]:
    """Settings to look around: every combination of few numbers, of many one number changed at a time."""
    usual = {name: float(candidate.settings[name]) for name in names}
    ends = [sorted({usual[name], -0.5, 0.0, 0.5, 1.0}) for name in names]
    if len(names) <= 2:
        yield from (dict(zip(names, point, strict=True)) for point in itertools.product(*ends))
        return
    for name, values in zip(names, ends, strict=True):
        yield from ({**usual, name: number} for number in values)


def _tensors(record: Any) -> list[Tensor]:
    """Every tensor of a record, of whole numbers and switches too."""
    if isinstance(record, Tensor):
        return [record]
    parts = record if isinstance(record, tuple) else vars(record).values() if hasattr(record, "__dict__") else ()
    return [tensor for part in parts if not isinstance(part, dict | list) for tensor in _tensors(part)]
