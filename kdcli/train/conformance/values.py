"""Checks of what an objective returns for a chunk of targets. The first line of a docstring is the claim."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import torch

from kdcli.api import Need, StudentOutput
from kdcli.errors import ConfigError
from kdcli.train.conformance.candidate import (
    Candidate,
    Chunk,
    Measure,
    NotApplicable,
    by_every_path,
    by_oracle,
    chunk,
    distance,
    value,
)

EXACT = 1e-9  # float64 through a few hundred operations
SINGLE = 2e-5  # float32 likewise


def one_number_per_target(candidate: Candidate) -> Measure:
    """one finite number for every target, unreduced"""
    at = chunk()
    values = value(candidate.make(), at)
    whole = values.shape == at.batch.targets.shape and bool(torch.isfinite(values).all())
    return Measure(0.0 if whole else 1.0, 0.0)


def targets_are_independent(candidate: Candidate) -> Measure:
    """a target's number does not depend on which other targets are beside it"""
    at, objective = chunk(), candidate.make()
    whole = value(objective, at)
    parts = [value(objective, at.part(slice(i, i + 1))) for i in range(at.z.shape[1])]
    return Measure(distance(torch.cat(parts, dim=1), whole), EXACT)


def equals_oracle(candidate: Candidate) -> Measure:
    """the formula, written a second time in float64 numpy, at several settings and from soft to saturated logits"""
    if candidate.oracle is None:
        raise NotApplicable("no second formula is known; give the class a static method `oracle`")
    error = 0.0
    for spread, changes in itertools.product((0.5, 2.0, 30.0, 1e4), list(candidate.variants())):
        at = chunk(spread=spread)
        expected = by_oracle(candidate, at, changes)
        if torch.isfinite(expected).all():
            for values, _ in by_every_path(candidate.make(**changes), at):
                error = max(error, distance(values, expected))
    return Measure(error, EXACT)


def zero_at_teacher(candidate: Candidate) -> Measure:
    """value and gradient vanish where the student's distribution is the teacher's"""
    candidate.require("zero_at_teacher", "it does not compare the student with the teacher")
    error = 0.0
    for changes in candidate.variants():
        at = chunk()
        at = at.moved(z=at.y)
        for values, gradient in by_every_path(candidate.make(**changes), at):
            error = max(error, *(distance(result, torch.zeros_like(result)) for result in (values, gradient)))
    return Measure(error, EXACT)


def positive_elsewhere(candidate: Candidate) -> Measure:
    """above zero where the distributions differ, however little"""
    candidate.require("zero_at_teacher", "it does not compare the student with the teacher")
    error = 0.0
    for changes, spread in itertools.product(candidate.variants(), (0.01, 0.5, 2.0, 10.0)):
        at = chunk(seed=6)
        at = at.moved(z=at.y + spread * at.z)
        lowest = -EXACT if changes else EXACT  # at the end of a setting's range it may be zero for all students
        for values, _ in by_every_path(candidate.make(**changes), at):
            error = max(error, lowest - float(values.nan_to_num(nan=-math.inf).min()))
    return Measure(error, 0.0)


def vocabulary_order(candidate: Candidate) -> Measure:
    """renaming the ids permutes the gradient and leaves the value"""
    at, objective = chunk(), candidate.make()
    order = torch.randperm(at.z.shape[-1], generator=torch.Generator().manual_seed(2))
    new_id = torch.argsort(order)
    renamed = replace(at.batch, targets=new_id[at.batch.targets], input_ids=new_id[at.batch.input_ids])
    other = Chunk(renamed, at.y[..., order], at.z[..., order])
    error = 0.0
    for (v1, g1), (v2, g2) in zip(by_every_path(objective, at), by_every_path(objective, other), strict=True):
        error = max(error, distance(v2, v1), distance(g2, g1[..., order]))
    return Measure(error, EXACT)


def logit_offset(candidate: Candidate) -> Measure:
    """a constant added to all logits of a target changes nothing, so its gradient sums to zero"""
    at, objective = chunk(), candidate.make()
    other = at.moved(y=at.y - 3.0, z=at.z + 7.0)
    error = 0.0
    for (v1, g1), (v2, g2) in zip(by_every_path(objective, at), by_every_path(objective, other), strict=True):
        total = g1.sum(-1)
        error = max(error, distance(v2, v1), distance(g2, g1), distance(total, torch.zeros_like(total)))
    return Measure(error, EXACT)


def temperature_divides_both_logits(candidate: Candidate) -> Measure:
    """temperature T is the logits of both models divided by T, and nothing else"""
    if "temperature" not in candidate.settings:
        raise NotApplicable("it has no temperature")
    plain = {"temperature_scale": "none"} if "temperature_scale" in candidate.settings else {}
    at, error = chunk(), 0.0
    for temperature in (0.7, 3.0):
        hot = candidate.make(temperature=temperature, **plain)
        divided = at.moved(y=at.y / temperature, z=at.z / temperature)
        one = by_every_path(candidate.make(temperature=1.0, **plain), divided)
        for (v1, g1), (v2, g2) in zip(one, by_every_path(hot, at), strict=True):
            error = max(error, distance(v2, v1), distance(g2 * temperature, g1))
    return Measure(error, EXACT)


def t2_scales_value_and_gradient(candidate: Candidate) -> Measure:
    """temperature_scale=t2 multiplies value and gradient alike by T squared"""
    if "temperature_scale" not in candidate.settings:
        raise NotApplicable("it has no temperature_scale")
    at = chunk()
    plain, scaled = (candidate.make(temperature=3.0, temperature_scale=s) for s in ("none", "t2"))
    error = 0.0
    for (v1, g1), (v2, g2) in zip(by_every_path(plain, at), by_every_path(scaled, at), strict=True):
        error = max(error, distance(v2, 9 * v1), distance(g2, 9 * g1))
    return Measure(error, EXACT)


def saturated_logits(candidate: Candidate) -> Measure:
    """finite in float32, value and gradient, where probabilities are below its smallest number"""
    error = 0.0
    for size, changes in itertools.product((30.0, 200.0, 1e4), list(candidate.variants())):
        at, objective = chunk(spread=size).to(torch.float32), candidate.make(**changes)
        exact, slope = by_every_path(objective, at.to(torch.float64))[0]
        largest = exact.abs().max().clamp(min=1.0)  # gradients are differences of numbers of this size
        for values, gradient in by_every_path(objective, at):
            error = max(error, distance(values, exact), distance(gradient / largest, slope / largest))
    return Measure(error, 1e-5)


def float32(candidate: Candidate) -> Measure:
    """float32 logits lose no more than float32 must, on a vocabulary of 1,000"""
    at = chunk(vocab=1000, targets=5, spread=4.0).to(torch.float32)
    exact = by_every_path(candidate.make(), at.to(torch.float64))[0]
    error = 0.0
    for values, gradient in by_every_path(candidate.make(), at):
        error = max(error, distance(values, exact[0]), distance(gradient, exact[1]))
    return Measure(error, SINGLE)


def sparse_teacher(candidate: Candidate) -> Measure:
    """all ids but one, in any order, say the same as all ids"""
    objective, temperature = _sparse(candidate)
    at = chunk()
    vocab = at.z.shape[-1]
    dense = value(objective, at)
    one = value(objective, at, at.sparse(vocab - 1, temperature))
    order = torch.randperm(7, generator=torch.Generator().manual_seed(4))
    seven, mixed = (value(objective, at, at.sparse(7, temperature, order=o)) for o in (None, order))
    return Measure(max(distance(one, dense), distance(mixed, seven)), 1e-6)  # the rest mass is held above 1e-7


def top_k_bound(candidate: Candidate) -> Measure:
    """a top-k teacher gives a value between 0 and the dense one, and closer to it with every k"""
    candidate.require("f_divergence", "merging ids may raise it: it is not a sum of q f(p / q)")
    objective, temperature = _sparse(candidate)
    at = chunk()
    dense, last, error = value(objective, at), torch.zeros_like(at.z[..., 0]), 0.0
    for k in (1, 2, 4, 8, 12, at.z.shape[-1] - 1):
        values = value(objective, at, at.sparse(k, temperature))
        error = max(error, float((last - values).max()), float((values - dense).max()))
        last = values
    return Measure(error, 1e-6)


def continuous_in_settings(candidate: Candidate) -> Measure:
    """the value has no jump in any number of its settings, their ends and zeros included"""
    names = candidate.numbers()
    if not names:
        raise NotApplicable("it has no numbers to vary")
    at, error, step = chunk(spread=1.0), 0.0, 1e-6
    points = [sorted({float(candidate.settings[name]), -0.5, 0.0, 0.5, 1.0}) for name in names]
    for point in itertools.product(*points):
        here = dict(zip(names, point, strict=True))
        for name, sign in itertools.product(names, (-1, 1)):
            near = {**here, name: here[name] + sign * step}
            if candidate.accepts(here) and candidate.accepts(near):
                pair = (value(candidate.make(**settings), at) for settings in (near, here))
                error = max(error, distance(*pair))
    return Measure(error, 1e-4)


def weight_and_domains_are_left_alone(candidate: Candidate) -> Measure:
    """weight and domains are kept for the Distiller and not applied here"""
    at = chunk()
    objective = candidate.make(weight=0.25, domains=["default"])
    kept = objective.weight == 0.25 and tuple(objective.domains) == ("default",)
    return Measure(distance(value(objective, at), value(candidate.make(), at)) if kept else 1.0, EXACT)


def inputs_stay_as_they_are(candidate: Candidate) -> Measure:
    """logits, and log-probabilities that objectives share, are not written into; asked twice, it says the same"""
    at, objective = chunk(), candidate.make()
    temperature = getattr(objective, "temperature", 1.0)
    teacher, student = at.signal(), StudentOutput(logits=at.z.clone())
    shared = [teacher.log_p(temperature), student.log_q(temperature), teacher.logits, student.logits]
    before = [t.clone() for t in shared if t is not None]
    with torch.no_grad():
        first = objective(at.batch, student, teacher).clone()
        objective.closed_form(at.batch, student, teacher)
        second = objective(at.batch, student, teacher)
    after = [t for t in shared if t is not None]
    return Measure(max(distance(second, first), *(distance(a, b) for a, b in zip(after, before, strict=True))), 0.0)


def state_is_restored(candidate: Candidate) -> Measure:
    """a copy loaded from state_dict() after some use says what the original says"""
    at, objective, copy = chunk(), candidate.make(), candidate.make()
    for seed in (1, 2, 3):
        value(objective, chunk(seed=seed))
    copy.load_state_dict(objective.state_dict())
    return Measure(distance(value(copy, at), value(objective, at)), 0.0)


def _sparse(candidate: Candidate) -> tuple:
    """(objective, its temperature), or NotApplicable where it takes no top-k teacher."""
    objective, at = candidate.make(), chunk(targets=1)
    if not objective.needs & Need.DISTRIBUTION:
        raise NotApplicable("it does not read the teacher's distribution")
    temperature = getattr(objective, "temperature", 1.0)
    try:
        value(objective, at, at.sparse(3, temperature))
    except ConfigError:
        raise NotApplicable("it refuses a top-k teacher") from None
    return objective, temperature
