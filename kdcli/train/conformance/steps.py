"""Checks of a whole optimizer step, through the Distiller: what its loss and gradients must not depend on."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from kdcli.api import Batch, Objective, StudentOutput, TeacherSignal
from kdcli.objective.cross_entropy import CrossEntropy
from kdcli.train.conformance import models
from kdcli.train.conformance.candidate import Candidate, Measure
from kdcli.train.conformance.models import TinyStudent, TinyTeacher, apart, step
from kdcli.train.distiller import Distiller

SINGLE = 1e-5  # sums of float32 in another order
HEADS = (
    {},
    {"tied": False},
    {"tied": False, "bias": True},
    {"scale": 0.5},
    {"softcap": 3.0},
    {"tied": False, "bias": True, "scale": 0.5, "softcap": 3.0},
)


def chunks_do_not_matter(candidate: Candidate) -> Measure:
    """how many targets share a chunk changes nothing but memory"""
    whole = models.batch()
    reference = step(models.distiller(candidate.make(), chunk=1000), [whole])
    parts = [step(models.distiller(candidate.make(), chunk=size), [whole]) for size in (1, 3, 7)]
    return Measure(max(apart(part, reference) for part in parts), SINGLE)


def chunked_is_dense(candidate: Candidate) -> Measure:
    """the chunked head equals whole-batch logits and autograd: tied, untied, bias, scale, soft-cap"""
    whole, error = models.batch(), 0.0
    for settings in HEADS:
        objective = candidate.make()
        model = models.distiller(objective, chunk=5, **settings)
        error = max(error, apart(step(model, [whole]), _dense(model, objective, whole)))
    return Measure(error, SINGLE)


def micro_batches_do_not_matter(candidate: Candidate) -> Measure:
    """any cut of a step into micro-batches gives its loss and gradient: no mean of means"""
    whole = models.batch(rows=6)
    reference = step(models.distiller(candidate.make()), [whole])
    error = 0.0
    for cuts in ((0, 1, 6), (0, 2, 4, 6), (0, 1, 2, 3, 4, 5, 6)):
        parts = [models.rows(whole, a, b) for a, b in pairwise(cuts)]
        error = max(error, apart(step(models.distiller(candidate.make()), parts), reference))
    return Measure(error, SINGLE)


def ranks_do_not_matter(candidate: Candidate) -> Measure:
    """gradients that ranks form apart, one of them without a target, add up to one process's"""
    whole = models.batch()
    reference = step(models.distiller(candidate.make()), [whole])
    empty = models.rows(whole, 3, 4)
    empty = replace(empty, mask=torch.zeros_like(empty.mask))
    ranks = [models.rows(whole, 0, 3), models.rows(whole, 3, 4), empty]
    counts = models.distiller(candidate.make()).count(whole)
    total = torch.zeros_like(reference)
    for share in ranks:
        model = models.distiller(candidate.make())
        loss, _ = model(share, counts)
        loss.backward()
        total += models.as_vector(float(loss.detach()), [p.grad for p in model.parameters() if p.requires_grad])
    return Measure(apart(total, reference), SINGLE)


def packing_does_not_matter(candidate: Candidate) -> Measure:
    """examples packed into one row give the loss of separate rows"""
    whole = models.batch()
    reference = step(models.distiller(candidate.make()), [whole])
    return Measure(apart(step(models.distiller(candidate.make()), [models.packed(whole)]), reference), SINGLE)


def masked_targets_do_not_matter(candidate: Candidate) -> Measure:
    """what stands at masked targets, -100 included, and under the padding changes nothing"""
    whole = models.batch()
    reference = step(models.distiller(candidate.make()), [whole])
    changed = replace(
        whole,
        targets=torch.where(whole.mask, whole.targets, -100),
        input_ids=torch.where(whole.attention_mask, whole.input_ids, 3),
    )
    return Measure(apart(step(models.distiller(candidate.make()), [changed]), reference), SINGLE)


def nothing_to_train_on(candidate: Candidate) -> Measure:
    """no supervised target gives a loss of 0 with a graph and gradients of 0"""
    whole = models.batch()
    vector = step(models.distiller(candidate.make()), [replace(whole, mask=torch.zeros_like(whole.mask))])
    return Measure(float(vector.abs().max()), 0.0)


def padded_vocabulary(candidate: Candidate) -> Measure:
    """rows of the embeddings that are no tokens, infinite ones included, change nothing"""
    whole, error = models.batch(), 0.0
    reference = step(models.distiller(candidate.make(), tied=False), [whole])
    for padding in (1e4, -math.inf, math.nan):
        student = TinyStudent(tied=False)
        with torch.no_grad():
            student.head.weight[models.VOCAB :] = padding
        vector = step(Distiller(student, TinyTeacher(padding=padding), {"it": candidate.make()}), [whole])
        error = max(error, apart(vector, reference))
    return Measure(error, SINGLE)


def bfloat16(candidate: Candidate) -> Measure:
    """a bfloat16 student errs at most twice as much as plain bfloat16 logits do, in the mean of 8 batches"""
    ours, plain = 0.0, 0.0
    for seed in range(8):
        whole = models.batch(seed=seed)
        low, exact = (TinyStudent(tied=False, seed=seed).cast(torch.bfloat16) for _ in range(2))
        reference = step(Distiller(exact.cast(torch.float32), TinyTeacher(), {"it": candidate.make()}), [whole])
        model = Distiller(low, TinyTeacher(), {"it": candidate.make()})
        ours += apart(step(model, [whole]), reference) / 8
        plain += apart(_dense(model, model.terms["it"], whole), reference) / 8
    return Measure(ours, 2 * plain)


def loss_falls(candidate: Candidate) -> Measure:
    """20 steps lower the loss, alone and beside cross_entropy (share of the loss that is left)"""
    whole, left = models.batch(), 0.0
    for other in ({}, {"ce": CrossEntropy()}):
        model = models.distiller({"it": candidate.make(), **other})
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
        losses = []
        for _ in range(21):
            losses.append(float(step(model, [whole])[0]))
            optimizer.step()
        left = max(left, losses[-1] / losses[0] if losses[0] > 0 else math.inf)
    return Measure(left, 0.9)


def _dense(model: Distiller, objective: Objective, whole: Batch) -> Tensor:
    """The vector of `step`, from logits of the whole batch in plain torch."""
    model.zero_grad()
    signal = model.teacher.annotate(whole, model.needs)
    head, hidden = signal.head, signal.hidden
    assert head is not None, "the tiny teacher gives a head"
    assert hidden is not None, "the tiny teacher gives hidden states"
    dense = TeacherSignal(logits=head(hidden), logprobs=signal.logprobs)
    values = objective(whole, StudentOutput(logits=model.student.head(model.student(whole))), dense)
    weight = whole.weight[whole.segment.clamp(min=0)]
    loss = objective.weight * (values * weight)[whole.mask].sum() / whole.mask.sum()
    loss.backward()
    return models.as_vector(float(loss.detach()), [p.grad for p in model.parameters() if p.requires_grad])
