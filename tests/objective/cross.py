"""Small micro-batches of two models with different tokenizers, in float64, and what each has computed.

Letters: T and T' positions of student and teacher, V and V' vocabularies, D and D' widths.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kdcli.api import Batch, ModelShape, Objective, StudentOutput, TeacherSignal, TeacherView, Unit
from kdcli.ops.head import Head

V, OTHER_V, D, OTHER_D = 7, 9, 4, 6
SHAPES = [
    ModelShape(layers=1, width=width, heads=1, kv_heads=1, head_width=width, vocab_size=vocab)
    for width, vocab in ((D, V), (OTHER_D, OTHER_V))
]
# Per row the targets in each span of (student, teacher), then targets outside of every span; prompts of 2 and 3 tokens.
ROWS = [([(1, 1), (2, 1), (1, 2), (1, 1)], (0, 0)), ([(2, 3), (1, 1)], (1, 1)), ([(1, 1), (1, 1)], (0, 2))]
PROMPT, OTHER_PROMPT = 2, 3


class DoubleHead(Head):
    """A head that keeps float64, for finite differences."""

    def __call__(self, hidden: Tensor) -> Tensor:
        size = self.vocab_size
        logits = hidden @ self.weight[:size].T
        if self.bias is not None:
            logits = logits + self.bias[:size]
        logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


@dataclass
class Models:
    """A micro-batch and both models' outputs; `student` has leaves that want gradients."""

    batch: Batch
    student: StudentOutput
    teacher: TeacherSignal

    def leaves(self) -> dict[str, Tensor]:
        """What of the student a run would differentiate by."""
        head = self.student.head
        known = {"hidden": self.student.hidden, "logprobs": self.student.logprobs}
        known |= {"weight": head.weight, "bias": head.bias} if head is not None else {}
        return {name: tensor for name, tensor in known.items() if tensor is not None}


def models(*, seed: int = 0, foreign: bool = True, rows: Any = ROWS, spread: float = 1.5) -> Models:
    """Random numbers of all kinds an objective may ask for; with a shared tokenizer the teacher's vocabulary is V."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return spread * torch.randn(*shape, generator=draw, dtype=torch.float64)

    batch = _batch(rows, draw, foreign)
    real = batch.attention_mask.unsqueeze(-1)
    other_v = OTHER_V if foreign else V
    student = StudentOutput(
        hidden=(normal(*batch.mask.shape, D) * real).requires_grad_(),
        head=_head(normal, V, D, True),
        embedding=normal(V + 2, D),
        logprobs=(-normal(*batch.mask.shape).abs() * batch.mask).requires_grad_(),
    )
    view = batch.teacher
    places = batch.mask.shape if view is None else view.input_ids.shape
    own = normal(*places, OTHER_D)
    own_logprobs = -normal(*places).abs() * (batch.mask if view is None else view.mask)
    teacher = TeacherSignal(head=_head(normal, other_v, OTHER_D, False), embedding=normal(other_v + 2, OTHER_D))
    if view is None:
        teacher.hidden, teacher.logprobs = own * real, own_logprobs
    else:
        teacher.own_hidden, teacher.own_logprobs = own, own_logprobs
        teacher.hidden = at_targets(own, view.position)
    return Models(batch, student, teacher)


def at_targets(values: Tensor, position: Tensor) -> Tensor:
    """[B, T', D] -> [B, T, D] at the student's positions, 0 where the teacher has none."""
    index = position.clamp(min=0).unsqueeze(-1).expand(-1, -1, values.shape[-1])
    return values.gather(1, index) * (position >= 0).unsqueeze(-1)


def prepared(objective: Objective, tokenizers: Any = None) -> Objective:
    """An objective that has seen both models, in float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        objective.fit(*SHAPES)
    if tokenizers is not None:
        objective.match(*tokenizers)
    return objective.double()


def summed(objective: Objective, at: Models) -> Tensor:
    """The sum over the units that the Distiller would take, ()."""
    values = objective(at.batch, at.student, at.teacher)
    return values[chosen(objective, at.batch)].sum()


def chosen(objective: Objective, batch: Batch) -> Tensor:
    units = objective.units(batch)
    return units & batch.mask if objective.unit is Unit.TOKEN else units & (batch.targets_by_sequence() > 0)


def packed(at: Models) -> Models:
    """The rows behind each other in one, for either model."""
    batch, view = at.batch, at.batch.teacher
    keep = batch.attention_mask
    own = keep if view is None else view.attention_mask

    def flat(values: Any, kept: Tensor = keep) -> Any:
        return None if values is None else values[kept].unsqueeze(0)

    if view is not None:
        start = (own.sum(1).cumsum(0) - own.sum(1)).unsqueeze(1)
        view = TeacherView(
            input_ids=flat(view.input_ids, own),
            attention_mask=flat(own, own),
            position=flat(torch.where(view.position < 0, -1, view.position + start)),
            targets=flat(view.targets, own),
            mask=flat(view.mask, own),
            span=flat(view.span),
            teacher_span=flat(view.teacher_span, own),
        )
    names = ("input_ids", "targets", "mask", "attention_mask", "segment")
    return Models(
        replace(batch, **{name: flat(getattr(batch, name)) for name in names}, teacher=view),
        replace(at.student, hidden=flat(at.student.hidden), logprobs=flat(at.student.logprobs)),
        replace(
            at.teacher,
            hidden=flat(at.teacher.hidden),
            logprobs=flat(at.teacher.logprobs),
            own_hidden=flat(at.teacher.own_hidden, own),
            own_logprobs=flat(at.teacher.own_logprobs, own),
        ),
    )


def row(at: Models, number: int) -> Models:
    """One row alone."""
    one = slice(number, number + 1)

    def cut(record: Any, *names: str) -> dict[str, Any]:
        return {n: None if getattr(record, n) is None else getattr(record, n)[one] for n in names}

    view = at.batch.teacher
    if view is not None:
        names = ("input_ids", "attention_mask", "position", "targets", "mask", "span", "teacher_span")
        view = replace(view, **cut(view, *names))
    fields = ("input_ids", "targets", "mask", "attention_mask", "segment", "weight", "row", "domain", "group", "score")
    batch = replace(at.batch, **cut(at.batch, *fields), teacher=view)
    batch.segment = torch.where(batch.segment < 0, -1, 0)
    return Models(
        batch,
        replace(at.student, **cut(at.student, "hidden", "logprobs")),
        replace(at.teacher, **cut(at.teacher, "hidden", "logprobs", "own_hidden", "own_logprobs")),
    )


def _head(normal: Any, vocab: int, width: int, learned: bool) -> DoubleHead:
    """With a bias, a scale, and two rows that are no tokens."""
    weight, bias = 0.5 * normal(vocab + 2, width), 0.3 * normal(vocab + 2)
    return DoubleHead(
        weight=weight.requires_grad_(learned), bias=bias.requires_grad_(learned), vocab_size=vocab, scale=0.8
    )


def _batch(rows: Any, draw: torch.Generator, foreign: bool) -> Batch:
    count = len(rows)
    sizes = [[sum(pair[side] for pair in spans) + extra[side] for spans, extra in rows] for side in (0, 1)]
    length, other = PROMPT + max(sizes[0]) - 1, OTHER_PROMPT + max(sizes[1]) - 1
    span, their_span = torch.full((count, length), -1), torch.full((count, other), -1)
    position = torch.full((count, length), -1)
    number = 0
    for b, (spans, _) in enumerate(rows):
        t, s = PROMPT - 1, OTHER_PROMPT - 1
        for mine, its in spans:
            span[b, t : t + mine], their_span[b, s : s + its], position[b, t] = number, number, s
            t, s, number = t + mine, s + its, number + 1

    def side(size: list[int], prompt: int, width: int, vocab: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ids = torch.randint(0, vocab, (count, width + 1), generator=draw)
        places, ends = torch.arange(width), torch.tensor(size).unsqueeze(1) + prompt - 1
        return ids[:, :-1].clone(), ids[:, 1:].clone(), places < ends, (places < ends) & (places >= prompt - 1)

    ids, targets, real, mask = side(sizes[0], PROMPT, length, V)
    batch = Batch(
        input_ids=ids,
        targets=targets,
        mask=mask,
        attention_mask=real,
        segment=torch.arange(count).unsqueeze(1).expand(count, length).masked_fill(~real, -1),
        weight=torch.ones(count),
        row=["row"] * count,
        domain=["default"] * count,
        group=[None] * count,
        score=[None] * count,
    )
    if foreign:
        ids, targets, real, mask = side(sizes[1], OTHER_PROMPT, other, OTHER_V)
        batch.teacher = TeacherView(
            input_ids=ids,
            attention_mask=real,
            position=position,
            targets=targets,
            mask=mask,
            span=span,
            teacher_span=their_span,
        )
    return batch
