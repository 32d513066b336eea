"""Checks of a whole optimizer step, through the Distiller: what its loss and gradients must not depend on."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import torch

from kdcli.api import Batch, Unit
from kdcli.objective.cross_entropy import CrossEntropy
from kdcli.train.conformance import models, records
from kdcli.train.conformance.batches import cuts
from kdcli.train.conformance.candidate import Candidate, Measure, NotApplicable
from kdcli.train.conformance.dense import dense
from kdcli.train.conformance.models import TinyStudent, apart, pair, step

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
    whole = models.batch(candidate)
    reference = step(pair(candidate, chunk=1000), [whole])
    parts = [step(pair(candidate, chunk=size), [whole]) for size in (1, 3, 7)]
    return Measure(max(apart(part, reference) for part in parts), SINGLE)


def chunked_is_dense(candidate: Candidate) -> Measure:
    """the chunked head equals whole-batch logits and autograd: tied, untied, bias, scale, soft-cap"""
    whole, error = models.batch(candidate), 0.0
    for settings in HEADS:
        model = pair(candidate, chunk=5, **settings)
        error = max(error, apart(step(model, [whole]), dense(model, whole)))
    return Measure(error, SINGLE)


def reductions_are_dense_means(candidate: Candidate) -> Measure:
    """the mean over targets, over sequences of means, and over sequences of sums, of whole-batch values"""
    if candidate.example.unit is not Unit.TOKEN:
        raise NotApplicable("its loss is the mean over its units; it has no reduction")
    whole, error = models.batch(candidate), 0.0
    for reduction in ("token", "sequence", "batch"):
        model = models.distiller(candidate.make(reduction=reduction), size=candidate.shapes[1])
        ends = cuts(whole)
        parts = [_rows(whole, a, b) for a, b in pairwise((0, ends[1], ends[-1]))]
        error = max(error, apart(step(model, parts), dense(model, whole)))
    return Measure(error, SINGLE)


def micro_batches_do_not_matter(candidate: Candidate) -> Measure:
    """any cut of a step into micro-batches, between groups, gives its loss and gradient: no mean of means"""
    whole = models.batch(candidate)
    reference = step(pair(candidate), [whole])
    ends, error = cuts(whole), 0.0
    for chosen in (ends[:2] + ends[-1:], ends[::2] + ends[-1:], ends):
        parts = [_rows(whole, a, b) for a, b in pairwise(chosen) if a < b]
        error = max(error, apart(step(pair(candidate), parts), reference))
    return Measure(error, SINGLE)


def ranks_do_not_matter(candidate: Candidate) -> Measure:
    """gradients that ranks form apart, one of them without a target, add up to one process's"""
    whole = models.batch(candidate)
    reference = step(pair(candidate), [whole])
    counts, total = pair(candidate).count(whole), torch.zeros_like(reference)
    for micro_batches in ranks(whole, 3):
        total += models.share(pair(candidate), micro_batches, counts)
    return Measure(apart(total, reference), SINGLE)


def packing_does_not_matter(candidate: Candidate) -> Measure:
    """examples packed into one row give the loss of separate rows"""
    whole = models.batch(candidate)
    reference = step(pair(candidate), [whole])
    return Measure(apart(step(pair(candidate), [records.packed(whole)]), reference), SINGLE)


def masked_targets_do_not_matter(candidate: Candidate) -> Measure:
    """what stands at masked targets, -100 included, and under the padding changes nothing"""
    whole = models.batch(candidate)
    reference = step(pair(candidate), [whole])
    changed = replace(
        whole,
        targets=torch.where(whole.mask, whole.targets, -100),
        input_ids=torch.where(whole.attention_mask, whole.input_ids, 3),
    )
    return Measure(apart(step(pair(candidate), [changed]), reference), SINGLE)


def nothing_to_train_on(candidate: Candidate) -> Measure:
    """no supervised target gives a loss of 0 with a graph and gradients of 0"""
    vector = step(pair(candidate), [_without_targets(models.batch(candidate))])
    return Measure(float(vector.abs().max()) if bool(torch.isfinite(vector).all()) else math.inf, 0.0)


def padded_vocabulary(candidate: Candidate) -> Measure:
    """rows of the embeddings that are no tokens, infinite ones included, change nothing"""
    whole, error = models.batch(candidate), 0.0
    reference = step(pair(candidate, tied=False), [whole])
    for padding in (1e4, -math.inf, math.nan):
        student = TinyStudent(tied=False)
        with torch.no_grad():
            student.head.weight[models.VOCAB :] = padding
        error = max(error, apart(step(pair(candidate, student=student, padding=padding), [whole]), reference))
    return Measure(error, SINGLE)


def bfloat16(candidate: Candidate) -> Measure:
    """a bfloat16 student errs at most twice as much as plain bfloat16 logits do, in the mean of 8 batches"""
    ours, plain = 0.0, 0.0
    for seed in range(8):
        whole = models.batch(candidate, seed=seed)
        low, exact = (TinyStudent(tied=False, seed=seed).cast(torch.bfloat16) for _ in range(2))
        model, reference = pair(candidate, student=low), pair(candidate, student=exact.cast(torch.float32))
        with torch.no_grad():
            exact.mixing.copy_(low.mixing)
        expected = step(reference, [whole])
        ours += apart(step(model, [whole]), expected) / 8
        plain += apart(dense(model, whole), expected) / 8
    return Measure(ours, 2 * plain)


def loss_falls(candidate: Candidate) -> Measure:
    """20 steps lower the loss, alone and beside cross_entropy (share of the loss that is left)"""
    whole, left = models.batch(candidate), 0.0
    for other in ({}, {"ce": CrossEntropy()}):
        model = models.distiller({"it": candidate.make(), **other}, size=candidate.shapes[1])
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
        losses = []
        for _ in range(21):
            vector = step(model, [whole])
            losses.append(float(vector[0]) if bool(torch.isfinite(vector).all()) else math.nan)
            optimizer.step()
        wrong = not losses[0] or not all(map(math.isfinite, losses))
        wrong = wrong or (losses[0] < 0 and candidate.claims("zero_at_teacher"))
        left = max(left, math.inf if wrong else 1 + (losses[-1] - losses[0]) / abs(losses[0]))
    if math.isfinite(left) and not getattr(candidate.example, "falls", True):
        raise NotApplicable("20 steps stay finite, and its value need not fall: it is no distance, or moves its target")
    return Measure(left, 0.9)


def ranks(whole: Batch, number: int) -> list[list[Batch]]:
    """A step's micro-batches for each of two or three ranks: unequal shares, and one without a target at the end."""
    ends = cuts(whole)
    first, last = _rows(whole, 0, ends[-2]), _rows(whole, ends[-2], ends[-1])
    parts = [[first], [last], [_without_targets(last)]]
    return parts if number == 3 else [parts[0] + parts[2], parts[1] + parts[2]]


def _rows(whole: Batch, start: int, stop: int) -> Batch:
    return records.sequences(whole, range(start, stop))


def _without_targets(whole: Batch) -> Batch:
    return replace(whole, mask=torch.zeros_like(whole.mask))
