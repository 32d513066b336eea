"""Random numbers for any objective, as its scope, needs and columns ask: what it would be handed in a run.

Letters: N targets, V vocabulary, V' a foreign teacher's, D and D' widths of student and teacher.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kdcli.api import (
    Batch,
    ModelShape,
    Need,
    Objective,
    Scope,
    StudentOutput,
    TeacherSignal,
    TopK,
    Unit,
)
from kdcli.train.conformance import batches, records
from kdcli.train.conformance.batches import FOREIGN_VOCAB, STUDENT, TEACHER, VOCAB, ToyTokenizer
from kdcli.train.conformance.candidate import LARGE, SMALL, Candidate
from kdcli.train.conformance.draw import DENSE, Draw, at_targets

CHUNK_VOCAB = 19


@dataclass(frozen=True, kw_only=True)
class Case:
    """A micro-batch, or of scope CHUNK a chunk of one, what both models computed for it, and which models they are."""

    batch: Batch
    student: StudentOutput
    teacher: TeacherSignal
    shapes: tuple[ModelShape, ModelShape] = (SMALL, LARGE)
    tokenizers: tuple[ToyTokenizer, ToyTokenizer] = (STUDENT, STUDENT)

    @property
    def z(self) -> Tensor:
        """The student's logits [1, N, V] of a chunk."""
        assert self.student.logits is not None, "only a chunk has logits"
        return self.student.logits

    @property
    def y(self) -> Tensor:
        """The teacher's logits [1, N, V] of a chunk."""
        assert self.teacher.logits is not None, "only a chunk has logits"
        return self.teacher.logits

    def leaves(self) -> dict[str, Tensor]:
        """What the student computed, by path."""
        return records.numbers(self.student)

    def moved(self, leaves: Mapping[str, Tensor] | None = None, teacher: Mapping[str, Tensor] | None = None) -> Case:
        """With these numbers of the student and of the teacher."""
        return replace(
            self,
            student=records.with_numbers(self.student, leaves or {}),
            teacher=records.with_numbers(self.teacher, teacher or {}),
        )

    def logits(self, y: Tensor | None = None, z: Tensor | None = None) -> Case:
        """A chunk with these logits, and what follows from the teacher's."""
        y = self.y if y is None else y
        changed = {"logits": y}
        if self.teacher.logprobs is not None:
            changed["logprobs"] = _target_logprobs(y, self.batch.targets)
        return self.moved({"logits": self.z if z is None else z}, changed)

    def sparse(self, k: int, temperature: float, order: Tensor | None = None) -> Case:
        """A chunk of a teacher that gives its K likeliest ids only, in the given order."""
        logprobs, ids = torch.log_softmax(self.y / temperature, -1).topk(k)
        if order is not None:
            logprobs, ids = logprobs[..., order], ids[..., order]
        topk = TopK(ids=ids, logprobs=logprobs, temperature=temperature)
        return replace(self, teacher=replace(self.teacher, logits=None, topk=topk, _log_softmax={}))

    def to(self, dtype: torch.dtype) -> Case:
        def cast(_: str, tensor: Tensor) -> Tensor:
            return tensor.to(dtype)

        batch = records.mapped(self.batch, lambda path, t: t.to(dtype) if path == "old_logprobs" else t)
        return replace(
            self,
            batch=batch,
            student=records.mapped(self.student, cast),
            teacher=records.mapped(self.teacher, cast),
        )

    def targets(self, window: slice) -> Case:
        """The targets of `window` of a chunk alone."""
        names = ("input_ids", "targets", "mask", "attention_mask", "segment", "old_logprobs")
        cut = {n: getattr(self.batch, n)[:, window] for n in names}
        teacher = records.mapped(self.teacher, lambda path, t: t if path == "reward" else t[:, window])
        student = StudentOutput(logits=self.z[:, window])
        return replace(self, batch=replace(self.batch, **cut), student=student, teacher=teacher)

    def sequences(self, chosen: Sequence[int]) -> Case:
        """Some rows alone, cut to the longest."""
        return replace(
            self,
            batch=records.sequences(self.batch, chosen),
            student=records.states_of_sequences(self.student, self.batch, chosen),
            teacher=records.states_of_sequences(self.teacher, self.batch, chosen),
        )

    def packed(self) -> Case:
        """All rows behind each other in one."""
        return replace(
            self,
            batch=records.packed(self.batch),
            student=records.packed_states(self.student, self.batch),
            teacher=records.packed_states(self.teacher, self.batch),
        )


def fitted(candidate: Candidate, at: Case, **changes: Any) -> Objective:
    """The objective with some settings changed, in the arithmetic of the case and knowing its models."""
    objective = candidate.make(**changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        objective.fit(*at.shapes)
    objective.match(*at.tokenizers)
    return objective.to(next(iter(at.leaves().values())).dtype)


def case(candidate: Candidate, changes: Mapping[str, Any] | None = None, **options: Any) -> Case:
    """A random case in float64 for the objective with some settings changed; `options` of `chunk` or `whole`."""
    objective = candidate.make(**(changes or {}))
    if objective.scope is Scope.CHUNK:
        return chunk(objective, **options)
    return whole(objective, shapes=candidate.shapes, **options)


def chunk(
    objective: Objective,
    *,
    seed: int = 5,
    spread: float = 2.0,
    same: bool = False,
    targets: int = 9,
    vocab: int | None = None,
) -> Case:
    """N supervised targets of three sequences, gathered, with logits of both models."""
    generator = torch.Generator().manual_seed(seed)
    foreign = objective.cross_tokenizer
    own = vocab or (VOCAB if foreign else CHUNK_VOCAB)
    theirs = FOREIGN_VOCAB if foreign and not same else own
    y, z = (spread * torch.randn(1, targets, size, generator=generator, dtype=torch.float64) for size in (theirs, own))
    ids = torch.randint(0, own, (1, targets + 1), generator=generator)
    following = ids[:, 1:].clone()
    third = targets // 3  # models are often sure of the target: of a third the teacher, of another the student
    following[:, :third] = y[:, :third].argmax(-1).clamp(max=own - 1)
    following[:, third : 2 * third] = z[:, third : 2 * third].argmax(-1)
    segment = (torch.arange(targets) * 3 // targets).unsqueeze(0)
    everywhere = torch.ones(1, targets, dtype=torch.bool)
    known = batches.batch(rows=3, columns=objective.columns)
    signal = TeacherSignal(logits=y, logprobs=None if foreign else _target_logprobs(y, following))
    if Need.REFERENCE in objective.needs:
        signal.reference_logprobs = -torch.rand(1, targets, generator=generator, dtype=torch.float64) * spread
    if Need.REWARD in objective.needs:
        signal.reward = torch.randn(3, generator=generator, dtype=torch.float64)
    batch = replace(
        known,
        input_ids=ids[:, :-1],
        targets=following,
        mask=everywhere,
        attention_mask=everywhere,
        segment=segment,
        old_logprobs=-torch.rand(1, targets, generator=generator, dtype=torch.float64) * spread,
    )
    shapes = (SMALL, SMALL if same else LARGE)
    if foreign and not same:
        shapes = (SMALL, replace(LARGE, vocab_size=FOREIGN_VOCAB))
    tokenizers = (STUDENT, TEACHER if foreign and not same else STUDENT)
    return Case(batch=batch, student=StudentOutput(logits=z), teacher=signal, shapes=shapes, tokenizers=tokenizers)


def whole(
    objective: Objective,
    *,
    shapes: tuple[ModelShape, ModelShape] = (SMALL, LARGE),
    seed: int = 5,
    spread: float = 2.0,
    same: bool = False,
    rows: int = 6,
    columns: Collection[str] | None = None,
    foreign: bool = True,
) -> Case:
    """A padded micro-batch of scope LOGPROBS or STATES. `spread`: the standard deviation of its numbers; `same`: both
    models are of one shape and one tokenizer; `columns`: other data than the objective asks for; `foreign`: with a
    teacher of another tokenizer, where the objective takes one."""
    foreign = foreign and objective.cross_tokenizer
    if same:
        shapes = (shapes[0], shapes[0])
    elif foreign:
        shapes = (shapes[0], replace(shapes[1], vocab_size=FOREIGN_VOCAB))
    given = objective.columns if columns is None else columns
    batch = batches.batch(rows, seed=seed, columns=given, foreign=foreign, identical=same)
    batch.old_logprobs = None if batch.old_logprobs is None else batch.old_logprobs.double()
    draw = Draw(seed, spread)
    student = StudentOutput()
    if objective.scope is Scope.LOGPROBS:
        student.logprobs = draw.logprobs(batch.mask)
    else:
        layers = draw.layers(shapes[0], batch.segment, objective.needs)
        student = StudentOutput(hidden=draw.last(shapes[0], batch.segment), head=draw.head(shapes[0]), **layers)
    return Case(
        batch=batch,
        student=student,
        teacher=_signal(objective, batch, shapes[1], draw),
        shapes=shapes,
        tokenizers=(STUDENT, TEACHER if foreign and not same else STUDENT),
    )


def selected(objective: Objective, at: Case) -> Tensor:
    """The units that the Distiller would sum: supervised, and those the objective has a number for."""
    batch = at.batch
    if objective.scope is Scope.CHUNK and objective.cross_tokenizer:
        return batch.mask  # a chunk has no view; the Distiller asks for the units of the whole micro-batch
    units = objective.units(batch)
    if objective.unit is Unit.TOKEN:
        return units & batch.mask
    supervised = batch.targets_by_sequence() > 0
    if objective.unit is Unit.GROUP:
        supervised = torch.zeros(len(units), dtype=torch.bool).index_fill(0, batch.groups()[supervised], True)
    return units & supervised


def _signal(objective: Objective, batch: Batch, shape: ModelShape, draw: Draw) -> TeacherSignal:
    needs, view = objective.needs, batch.teacher
    signal = TeacherSignal()
    if needs & (DENSE | Need.HIDDEN):
        signal.head = draw.head(shape)
        signal.hidden = draw.last(shape, batch.segment)
    if view is None:
        for name, value in draw.layers(shape, batch.segment, needs).items():
            setattr(signal, name, value)
    else:
        signal = _at_own_positions(signal, batch, shape, needs, draw)
    if Need.LOGPROBS in needs and view is None:
        signal.logprobs = draw.logprobs(batch.mask)
    if Need.REFERENCE in needs:
        signal.reference_logprobs = draw.logprobs(batch.mask)
    if Need.REWARD in needs:
        signal.reward = draw(batch.num_sequences)
    return signal


def _at_own_positions(signal: TeacherSignal, batch: Batch, shape: ModelShape, needs: Need, draw: Draw) -> TeacherSignal:
    """A foreign teacher's: at its own positions, and of those at the student's."""
    view = batch.teacher
    assert view is not None, "a foreign teacher has its own view"
    assert view.mask is not None, "a foreign teacher has its own view"
    own = torch.where(view.attention_mask, 0, -1)
    if signal.hidden is not None:
        signal.own_hidden = draw.last(shape, own)
        signal.hidden = at_targets(signal.own_hidden, view.position)
    if Need.HIDDEN in needs:
        states = draw.layers(shape, own, needs)
        signal.hidden_states = tuple(at_targets(layer, view.position) for layer in states["hidden_states"])
        signal.embedding = states["embedding"]
    if Need.LOGPROBS in needs:
        signal.own_logprobs = draw.logprobs(view.mask)
    return signal


def _target_logprobs(y: Tensor, targets: Tensor) -> Tensor:
    return torch.log_softmax(y, -1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
