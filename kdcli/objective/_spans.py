"""What of a student's and a teacher's answer can be compared, whether their tokenizers differ or not.

Letters: S spans, T' the teacher's positions (the student's own T where both share a tokenizer).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kdcli.api import Batch, StudentOutput, TeacherSignal
from kdcli.errors import ConfigError
from kdcli.ops.head import Head


@dataclass(frozen=True, kw_only=True)
class Spans:
    """The stretches of the answers that both tokenizers cut alike: of each, at least one target of either model.

    With a shared tokenizer every supervised target is a span of its own, and the teacher's targets are the student's.
    """

    number: int  # S
    student: Tensor  # [B, T] the span (0..S-1) of the target; -1 where none, such as where it is not supervised
    teacher: Tensor  # [B, T'] the span of the teacher's target

    def first(self, of: Tensor) -> Tensor:
        """[S] where each span begins, as an index into the flattened positions of `of` (`student` or `teacher`)."""
        return self._edge(of, "amin", of.numel())

    def last(self, of: Tensor) -> Tensor:
        """[S] where each span ends."""
        return self._edge(of, "amax", -1)

    def sums(self, values: Tensor, of: Tensor) -> Tensor:
        """Values at the positions of `of` -> [S]: their sum over each span, differentiable."""
        kept = values[of >= 0]
        return kept.new_zeros(self.number).index_add(0, of[of >= 0], kept)

    def starts(self) -> Tensor:
        """[B, T] bool: the student's first target of each span, where one number per span stands."""
        starts = torch.zeros(self.student.numel(), dtype=torch.bool, device=self.student.device)
        starts[self.first(self.student)] = True
        return starts.view_as(self.student)

    def exact(self) -> Tensor:
        """[B, T] bool: spans of one target of the student's and one of the teacher's."""
        single = [torch.bincount(of[of >= 0], minlength=self.number) == 1 for of in (self.student, self.teacher)]
        both = torch.cat([single[0] & single[1], single[0].new_zeros(1)])  # the last one is of the span -1
        return both[self.student]

    def at_starts(self, values: Tensor) -> Tensor:
        """[S] -> [B, T]: each span's value at the student's first target, 0 elsewhere."""
        flat = values.new_zeros(self.student.numel()).index_put((self.first(self.student),), values)
        return flat.view_as(self.student)

    def _edge(self, of: Tensor, reduce: str, start: int) -> Tensor:
        index = torch.arange(of.numel(), device=of.device).view_as(of)[of >= 0]
        edges = torch.full((self.number,), start, device=of.device)
        return edges.scatter_reduce(0, of[of >= 0], index, reduce)


def spans_of(batch: Batch) -> Spans:
    """The spans of a batch's supervised targets. A span's targets are all of the answer or none is: of those that
    `mask` leaves out nothing is read."""
    view = batch.teacher
    if view is None or not view.foreign:
        alone = batch.mask if view is None else batch.mask & (view.position >= 0)
        student = torch.where(alone, alone.flatten().cumsum(0).view_as(alone) - 1, -1)
        return Spans(number=int(alone.sum()), student=student, teacher=student)
    assert view.span is not None and view.teacher_span is not None and view.mask is not None, "spans come with targets"
    student = view.span.masked_fill(~batch.mask, -1)
    teacher = view.teacher_span.masked_fill(~view.mask, -1)
    size = 1 + max(-1, *(int(of.max()) for of in (student, teacher) if of.numel()))
    both = torch.stack([torch.bincount(of[of >= 0], minlength=size) > 0 for of in (student, teacher)]).all(0)
    number = both.cumsum(0)
    renumbered = torch.cat([torch.where(both, number - 1, -1), number.new_full((1,), -1)])  # the last one is of -1
    return Spans(
        number=int(number[-1]) if size else 0,
        student=renumbered[student],
        teacher=renumbered[teacher],
    )


def teacher_hidden(batch: Batch, teacher: TeacherSignal) -> Tensor:
    """The hidden states [B, T', D] that predict the teacher's targets."""
    hidden = teacher.own_hidden if _foreign(batch) else teacher.hidden
    assert hidden is not None, "the teacher gives hidden states at its own positions"
    return hidden


def teacher_targets(batch: Batch) -> Tensor:
    """[B, T'] what the teacher's positions predict."""
    if not _foreign(batch):
        return batch.targets
    assert batch.teacher is not None and batch.teacher.targets is not None
    return batch.teacher.targets


def heads(batch: Batch, student: StudentOutput, teacher: TeacherSignal, what: str) -> tuple[Head, Head]:
    """The heads of student and teacher: of a shared tokenizer both cut to the ids that both have.

    Raises ConfigError, in the name of the objective `what`, for a teacher without logits.
    """
    assert student.head is not None, "scope STATES sees the head"
    if teacher.head is None:
        raise ConfigError(f"{what} needs the teacher's logits of the whole vocabulary; set teacher=hf")
    if _foreign(batch):
        return student.head, teacher.head
    shared = min(student.head.vocab_size, teacher.head.vocab_size)
    return student.head.cut(shared), teacher.head.cut(shared)


def compared(batch: Batch) -> Tensor:
    """[B, T] bool: the targets whose prediction the teacher makes too, of what follows the same text."""
    view = batch.teacher
    return torch.ones_like(batch.mask) if view is None else view.position >= 0


def _foreign(batch: Batch) -> bool:
    return batch.teacher is not None and batch.teacher.foreign
