"""A teacher and a student small enough to train in a millisecond, with layers, attention and tokenizers.

A layer sees a position's own token only, so that packing and padding can change nothing but what the loss does with
them; attention probabilities are of the sequence, and nothing attends to them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from kdcli.api import (
    Batch,
    ModelShape,
    Need,
    Objective,
    Relations,
    Student,
    StudentOutput,
    Teacher,
    TeacherSignal,
    TeacherView,
)
from kdcli.ops.head import Head
from kdcli.train.conformance import batches
from kdcli.train.conformance.batches import FOREIGN_VOCAB, STUDENT, TEACHER, VOCAB
from kdcli.train.conformance.candidate import LARGE, SMALL, Candidate, distance
from kdcli.train.conformance.draw import DENSE, at_targets
from kdcli.train.distiller import Distiller

PADDING = 3  # rows of the embeddings that are no tokens
PADDED = VOCAB + PADDING


class TinyStudent(Student):
    """An embedding, two layers of tanh, and a head: tied or not, with a bias, a scale and a soft-cap."""

    provides = Need.HIDDEN | Need.ATTENTION | Need.RELATIONS

    def __init__(
        self,
        *,
        seed: int = 1,
        size: ModelShape = SMALL,
        tied: bool = True,
        bias: bool = False,
        scale: float = 1.0,
        softcap: float | None = None,
    ) -> None:
        super().__init__()
        self.size = size
        self.tokenizer = STUDENT
        generator = torch.Generator().manual_seed(seed)
        rows, width = size.vocab_size + PADDING, size.width
        self.embedding = nn.Parameter(torch.randn(rows, width, generator=generator))
        self.output = None if tied else nn.Parameter(torch.randn(rows, width, generator=generator))
        offset = nn.Parameter(torch.randn(rows, generator=generator)) if bias else None
        self.mixing = nn.Parameter(torch.randn(width, width, generator=generator) / math.sqrt(width))
        weight = self.embedding if self.output is None else self.output
        self.head = Head(weight=weight, vocab_size=size.vocab_size, bias=offset, scale=scale, softcap=softcap)

    def load(self, device: torch.device) -> None: ...

    def shape(self) -> ModelShape:
        return self.size

    def forward(self, batch: Batch | TeacherView) -> Tensor:
        return self.layers(batch)[-1]

    def layers(self, view: Batch | TeacherView) -> tuple[Tensor, ...]:
        """[B, T, D] after the embedding, then after each layer."""
        known = [nn.functional.embedding(view.input_ids, self.embedding)]
        for number in range(self.size.layers):
            last = torch.tanh(known[-1])
            known.append(last + 0.1 * number * last @ self.mixing)
        return tuple(known)

    def states(self, batch: Batch, needs: Need) -> StudentOutput:
        layers = self.layers(batch)
        return StudentOutput(
            hidden=layers[-1],
            hidden_states=layers if Need.HIDDEN in needs else None,
            embedding=self.embedding if Need.HIDDEN in needs else None,
            attentions=self._each(layers, lambda one: attention(one, batch), Need.ATTENTION in needs),
            relations=self._each(layers, lambda one: one, Need.RELATIONS in needs),
        )

    def cast(self, dtype: torch.dtype) -> TinyStudent:
        """The same numbers in another type. Only before a Distiller takes it."""
        self.to(dtype)
        self.head = replace(self.head, weight=self.embedding if self.output is None else self.output)
        return self

    def _each(self, layers: Sequence[Tensor], make: Any, wanted: bool) -> Any:
        return tuple(make(self._relations(layer)) for layer in layers[:-1]) if wanted else None

    def _relations(self, layer: Tensor) -> Relations:
        own, shared = self.size.heads * self.size.head_width, self.size.kv_heads * self.size.head_width
        split = (*layer.shape[:2], -1, self.size.head_width)
        other = layer @ self.mixing
        return Relations(
            queries=layer[..., :own].reshape(split),
            keys=other[..., :shared].reshape(split),
            values=other[..., -shared:].reshape(split),
        )


def attention(one: Relations, batch: Batch) -> Tensor:
    """[B, H, T, T]: what each position of a sequence sees of those before it; rows of padding see all alike."""
    repeat = one.queries.shape[2] // one.keys.shape[2]
    keys = one.keys.repeat_interleave(repeat, dim=2)
    scores = torch.einsum("bihd,bjhd->bhij", one.queries, keys).float() / math.sqrt(keys.shape[-1])
    segment = batch.segment
    seen = torch.ones(scores.shape[-2:]).tril().bool() & (segment.unsqueeze(1) == segment.unsqueeze(2))
    seen &= batch.attention_mask.unsqueeze(1)
    return torch.softmax(scores.masked_fill(~seen.unsqueeze(1), -1e30), -1).to(one.queries.dtype)


class TinyTeacher(Teacher):
    """A larger one of the same kind, frozen. `padding`: what stands in the rows that are no tokens; `foreign`: with
    another tokenizer."""

    provides = DENSE | Need.LOGPROBS | Need.HIDDEN | Need.ATTENTION | Need.RELATIONS | Need.REWARD

    def __init__(self, *, size: ModelShape = LARGE, foreign: bool = False, padding: float | None = None) -> None:
        self.tokenizer = TEACHER if foreign else STUDENT
        size = replace(size, vocab_size=FOREIGN_VOCAB) if foreign else size
        self.model = TinyStudent(seed=2, size=size, tied=False).requires_grad_(False)
        if padding is not None:
            self.model.head.weight[size.vocab_size :] = padding

    def shape(self) -> ModelShape:
        return self.model.size

    @torch.no_grad()
    def annotate(self, batch: Batch, needs: Need) -> TeacherSignal:
        view = batch.teacher
        states = self.model.states(batch if view is None else replace(batch, input_ids=view.input_ids), needs)
        hidden, head = states.hidden, self.model.head
        assert hidden is not None, "a model has a last layer"
        signal = TeacherSignal(embedding=states.embedding)
        if needs & (DENSE | Need.HIDDEN):
            signal.head, signal.hidden = head, hidden if view is None else at_targets(hidden, view.position)
        if Need.REWARD in needs:
            signal.reward = torch.tanh(batch.sum_by_sequence(torch.cos(batch.targets * 1.0)))
        if view is None:
            signal.logprobs = _logprobs(head(hidden), batch.targets) if Need.LOGPROBS in needs else None
            return replace(
                signal, hidden_states=states.hidden_states, attentions=states.attentions, relations=states.relations
            )
        assert view.targets is not None, "a foreign teacher has targets of its own"
        signal.own_hidden = hidden if signal.hidden is not None else None
        signal.own_logprobs = _logprobs(head(hidden), view.targets) if Need.LOGPROBS in needs else None
        if states.hidden_states is not None:
            signal.hidden_states = tuple(at_targets(layer, view.position) for layer in states.hidden_states)
        return signal


def distiller(
    objectives: Objective | Mapping[str, Objective],
    *,
    chunk: int | None = None,
    student: TinyStudent | None = None,
    padding: float | None = None,
    size: ModelShape = LARGE,
    **settings: Any,
) -> Distiller:
    """The pair with these terms; `settings` are TinyStudent's where none is given, `size` and `padding` TinyTeacher's.
    The student has moved a little since it began, so that it is not its reference."""
    terms = dict(objectives) if isinstance(objectives, Mapping) else {"it": objectives}
    foreign = any(term.cross_tokenizer for term in terms.values())
    student = student or TinyStudent(**settings)
    teacher = TinyTeacher(size=size, foreign=foreign, padding=padding)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # what objectives learn begins alike in every pair
        model = Distiller(student, teacher, terms, chunk, foreign=foreign)
    student.began = [copy.deepcopy(student)]  # in a list, as it is no part of the student  # pyright: ignore
    noise = torch.randn(student.mixing.shape, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        student.mixing.add_(noise.to(student.mixing.dtype))
    return model


def pair(candidate: Candidate, *, chunk: int | None = None, **settings: Any) -> Distiller:
    """A new instance of the objective in a Distiller, with models of shapes that it takes."""
    return distiller(candidate.make(), chunk=chunk, size=candidate.shapes[1], **settings)


def batch(candidate: Candidate, rows: int = 6, seed: int = 7) -> Batch:
    """What the objective trains on."""
    example = candidate.example
    return batches.batch(rows, seed, columns=example.columns, foreign=example.cross_tokenizer)


def step(model: Distiller, micro_batches: Sequence[Batch]) -> Tensor:
    """Loss and gradients of one optimizer step as one vector: the loss, then every parameter's gradient."""
    model.zero_grad()
    counts: dict[str, float] = {}
    for one in micro_batches:
        for name, number in model.count(one).items():
            counts[name] = counts.get(name, 0.0) + number
    return share(model, micro_batches, counts)


def share(model: Distiller, micro_batches: Sequence[Batch], counts: Mapping[str, float]) -> Tensor:
    """What these micro-batches add to the vector of a step with these counts."""
    total = 0.0
    for one in micro_batches:
        loss, _ = model(one, counts)
        loss.backward()
        total += float(loss.detach())
    return as_vector(total, model)


def as_vector(loss: float, model: Distiller) -> Tensor:
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters() if p.requires_grad]
    return torch.cat([torch.tensor([loss]), *(g.float().flatten() for g in gradients)])


def apart(one: Tensor, other: Tensor) -> float:
    """The larger of two relative errors, each by its own largest number: of the loss, and of the gradients."""
    errors = []
    for part, least in ((slice(0, 1), 1e-2), (slice(1, None), 1e-6)):
        size = float(other[part].abs().max().clamp(min=least))
        errors.append(distance(one[part] / size, other[part] / size))
    return max(errors)


def _logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    return torch.log_softmax(logits, -1).gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
