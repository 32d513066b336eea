"""Checks of what an objective returns for a micro-batch, or for a chunk of one. The first line of a docstring is the
claim.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kdcli.api import Need, Objective, Scope, Unit
from kdcli.ops.head import Head
from kdcli.train.conformance import records
from kdcli.train.conformance.candidate import Candidate, Measure, NotApplicable, distance
from kdcli.train.conformance.case import Case, case, fitted, selected
from kdcli.train.conformance.evaluate import (
    Result,
    apart,
    by_every_path,
    by_oracle,
    gradients_apart,
    raw,
    size,
    takes_top_k,
    value,
)

EXACT = 1e-9  # float64 through a few hundred operations
SINGLE = 2e-5  # float32 likewise


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
    for at in _kinds(candidate):
        objective = fitted(candidate, at)
        parts = [value(objective, part) for part in _parts(at)]
        error = max(error, distance(torch.cat(parts), value(objective, at)))
    return Measure(error, EXACT)


def packing_is_padding(candidate: Candidate) -> Measure:
    """sequences behind each other in one row have the numbers of rows of their own"""
    error = 0.0
    for at in _kinds(candidate):
        if at.student.logits is not None:
            raise NotApplicable("it sees one target at a time")
        objective = fitted(candidate, at)
        error = max(error, distance(value(objective, at.packed()), value(objective, at)))
    return Measure(error, EXACT)


def equals_oracle(candidate: Candidate) -> Measure:
    """the formula, written a second time in float64 numpy, at several settings and from small to extreme numbers"""
    error = 0.0
    for changes, spread in _settings_and_spreads(candidate, 2.0, 0.5, 30.0, 1e4):
        for at in _kinds(candidate, changes, spread) if spread == 2.0 else [case(candidate, changes, spread=spread)]:
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


def padding_holds_anything(candidate: Candidate) -> Measure:
    """what stands at padding and, per target, at unsupervised ones changes no value and gets no gradient"""
    error = 0.0
    for at in _kinds(candidate):
        if at.student.logits is not None:
            raise NotApplicable("it sees supervised targets only")
        objective = fitted(candidate, at)
        other, free = _with_garbage(at)
        (one,), (two,) = by_every_path(objective, at), by_every_path(objective, other)
        inside = {path: torch.where(free[path], 0.0, g) if path in free else g for path, g in two.gradients.items()}
        outside = Result(two.values, {path: torch.where(free[path], two.gradients[path], 0.0) for path in free})
        error = max(error, apart(Result(two.values, inside), one), size(Result(two.values[:0], outside.gradients)))
    return Measure(error, EXACT)


def saturated_inputs(candidate: Candidate) -> Measure:
    """finite in float32, value and gradient, where probabilities are below its smallest number, and as good as inputs
    rounded to float32 allow"""
    error = 0.0
    for changes, spread in _settings_and_spreads(candidate, 200.0, 30.0, 1e4):
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


# ---------------------------------------------------------------------------------------------------- cases


def _kinds(candidate: Candidate, changes: Mapping[str, Any] | None = None, spread: float = 2.0) -> Iterator[Case]:
    """The usual case, and other data that the objective may meet: no other tokenizer, text that no policy wrote, and
    scored groups in place of pairs."""
    objective = candidate.make(**(changes or {}))
    yield case(candidate, changes, spread=spread)
    if objective.scope is Scope.CHUNK:
        return
    if objective.cross_tokenizer:
        yield case(candidate, changes, foreign=False)
    if objective.scope is Scope.LOGPROBS:
        at = case(candidate, changes)
        yield replace(at, batch=replace(at.batch, old_logprobs=None))
    if objective.columns & {"rejected", "score", "group"}:
        for columns in ({"rejected"}, {"score", "group"}):
            if columns != objective.columns:
                at = case(candidate, changes, columns=columns | objective.columns)
                if selected(objective, at).any():
                    yield at


def _settings_and_spreads(candidate: Candidate, *spreads: float) -> Iterator[tuple[dict[str, Any], float]]:
    """Every variant with every spread; of a whole micro-batch, which costs more, a changed setting with the first."""
    for changes in candidate.variants():
        few = bool(changes) and candidate.example.scope is not Scope.CHUNK
        yield from ((changes, spread) for spread in (spreads[:1] if few else spreads))


def _parts(at: Case) -> Iterator[Case]:
    """Each target of a chunk, or each group of a micro-batch, alone."""
    if at.student.logits is not None:
        yield from (at.targets(slice(i, i + 1)) for i in range(at.z.shape[1]))
        return
    groups = at.batch.groups().tolist()
    for group in range(max(groups) + 1):
        yield at.sequences([i for i, known in enumerate(groups) if known == group])


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


def _with_garbage(at: Case) -> tuple[Case, dict[str, Tensor]]:
    """The case with large numbers where nothing may be read, and where that is in what the student computed."""
    generator = torch.Generator().manual_seed(9)
    batch, view = at.batch, at.batch.teacher
    padding, unread = ~batch.attention_mask, ~batch.mask
    free: dict[str, Tensor] = {}

    def spoiled(path: str, tensor: Tensor, own: bool) -> Tensor:
        name = path.split(".")[0]
        if name in ("head", "embedding", "reward", "weight") or (own and name == "logprobs"):
            return tensor  # the student's log-probabilities are 0 where nothing is supervised
        where = unread if name.endswith("logprobs") else padding
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
    if at.student.logits is None and not isinstance(at.student.head, Head):
        raise NotApplicable("it sees no logits")


def _require_soft(candidate: Candidate) -> None:
    if candidate.claims("hard_part"):
        raise NotApplicable("a part of it has no temperature")


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


def _points(candidate: Candidate, names: list[str]) -> Iterator[dict[str, float]]:
    """Settings to look around: every combination of few numbers, of many one number changed at a time."""
    usual = {name: float(candidate.settings[name]) for name in names}
    ends = [sorted({usual[name], -0.5, 0.0, 0.5, 1.0}) for name in names]
    if len(names) <= 2:
        yield from (dict(zip(names, point, strict=True)) for point in itertools.product(*ends))
        return
    for name, values in zip(names, ends, strict=True):
        yield from ({**usual, name: number} for number in values)


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


def _tensors(record: Any) -> list[Tensor]:
    """Every tensor of a record, of whole numbers and switches too."""
    if isinstance(record, Tensor):
        return [record]
    parts = record if isinstance(record, tuple) else vars(record).values() if hasattr(record, "__dict__") else ()
    return [tensor for part in parts if not isinstance(part, dict | list) for tensor in _tensors(part)]
