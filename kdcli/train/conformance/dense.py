"""An optimizer step a second time: logits of the whole batch, autograd, and means in plain loops."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kdcli.api import Batch, Objective, Scope, StudentOutput, TeacherSignal, Unit
from kdcli.train.conformance import models, records
from kdcli.train.distiller import Distiller


def dense(model: Distiller, whole: Batch) -> Tensor:
    """The vector of `step`, from logits of the whole batch in plain torch."""
    model.zero_grad()
    (objective,) = model.terms.values()
    signal = _dense_signal(model, objective, whole)
    student = model.student.states(whole, objective.needs)
    hidden, head = student.hidden, model.student.head
    assert hidden is not None, "a model has a last layer"
    if objective.scope is Scope.CHUNK:
        values = _of_one_chunk(objective, whole, head(hidden), signal)
        return _summed(model, objective, whole, values)
    if objective.scope is Scope.LOGPROBS:
        student = StudentOutput(logprobs=_logprobs(head(hidden), whole))
    else:
        student = replace(student, head=head)
    return _summed(model, objective, whole, objective(whole, student, signal))


def _of_one_chunk(objective: Objective, whole: Batch, logits: Tensor, signal: TeacherSignal) -> Tensor:
    """Values [B, T], of all supervised targets gathered to one chunk."""
    mask = whole.mask

    def gathered(path: str, tensor: Tensor) -> Tensor:
        by_target = path in ("hidden", "logprobs", "reference_logprobs")
        return tensor[mask].unsqueeze(0) if by_target else tensor

    names = ("input_ids", "targets", "mask", "attention_mask", "segment", "old_logprobs")
    flat = {name: getattr(whole, name)[mask].unsqueeze(0) for name in names}
    signal = records.mapped(signal, gathered)
    if signal.hidden is not None and signal.head is not None:
        signal.logits = signal.head(signal.hidden)
    student = StudentOutput(logits=logits[mask].unsqueeze(0))
    values = objective(replace(whole, **flat, teacher=None), student, signal)
    return torch.zeros(mask.shape).masked_scatter(mask, values)


def _summed(model: Distiller, objective: Objective, whole: Batch, values: Tensor) -> Tensor:
    loss = whole.weight.new_zeros(())
    for index, part in mean_shares(whole, objective).items():
        loss = loss + part * values[index]
    loss = objective.weight * loss
    loss.backward()
    return models.as_vector(float(loss.detach()), model)


def mean_shares(whole: Batch, objective: Objective) -> dict[tuple[int, ...], float]:
    """Index of a unit -> what it counts for in the mean, in plain loops."""
    units, weight = objective.units(whole).tolist(), whole.weight.tolist()
    targets: dict[int, list[tuple[int, ...]]] = {}  # of each sequence
    for b, t in whole.mask.nonzero().tolist():
        targets.setdefault(int(whole.segment[b, t]), []).append((b, t))
    if objective.unit is Unit.TOKEN:
        kept = {e: [(b, t) for b, t in places if units[b][t]] for e, places in targets.items()}
        kept = {e: places for e, places in kept.items() if places}
        number = sum(map(len, kept.values())) if objective.reduction == "token" else len(kept)
        each = {e: len(places) if objective.reduction == "sequence" else 1 for e, places in kept.items()}
        return {place: weight[e] / (number * each[e]) for e, places in kept.items() for place in places}
    owner = range(whole.num_sequences)
    if objective.unit is Unit.GROUP:
        groups = whole.groups().tolist()
        owner = [groups.index(group) for group in range(max(groups) + 1)]
    chosen = [u for u, e in enumerate(owner) if units[u] and e in targets]
    return {(u,): weight[owner[u]] / len(chosen) for u in chosen}


def _dense_signal(model: Distiller, objective: Objective, whole: Batch) -> TeacherSignal:
    signal = model.teacher.annotate(whole, objective.needs)
    began = model.student.began[0]  # pyright: ignore[reportIndexIssue]
    with torch.no_grad():
        reference = _logprobs(began.head(began(whole)), whole)  # pyright: ignore
    return replace(signal, reference_logprobs=reference)


def _logprobs(logits: Tensor, whole: Batch) -> Tensor:
    found = torch.log_softmax(logits, -1).gather(-1, whole.targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return found * whole.mask
