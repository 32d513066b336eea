"""Rows to a Batch: the only place that shifts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from kdcli.api import Batch, TeacherView
from kdcli.store.tokens import Row, Segment, TeacherTokens


def collate(rows: Sequence[Row], *, pad_id: int) -> Batch:
    """Pad on the right, and put beside each token the one that follows it in its own example.

    A row's last token, and each packed example's last token, predict nothing. Packed rows carry position_ids, which
    start again at 0 with each example and with the padding, so that transformers keeps all of them apart. A bundle
    gives a line to each of its answers, and they are one group. The teacher's own tokens, where there are any, are laid
    out in the same way.
    """
    lines = [line for row in rows for line in row.lines()]
    segments = [segment for line in lines for segment in line]
    sheet = _Sheet.of([[segment.ids for segment in line] for line in lines])
    return Batch(
        input_ids=sheet.tokens(pad_id),
        targets=sheet.targets([segment.ids for segment in segments], pad_id),
        mask=sheet.targets([segment.mask for segment in segments], False),
        attention_mask=sheet.attention_mask(),
        segment=sheet.fill([np.full(len(segment), number) for number, segment in enumerate(segments)], -1),
        position_ids=sheet.position_ids(),
        weight=torch.tensor([segment.weight for segment in segments], dtype=torch.float32),
        row=[segment.key for segment in segments],
        domain=[segment.domain for segment in segments],
        group=[segment.group for segment in segments],
        score=[segment.score for segment in segments],
        rejected=torch.tensor([segment.rejected for segment in segments])
        if any(segment.rejected for segment in segments)
        else None,
        group_index=_group_index(rows) if any(row.bundle for row in rows) else None,
        teacher=_teacher_view(lines, sheet) if any(segment.teacher for segment in segments) else None,
    )


@dataclass(frozen=True)
class _Sheet:
    """The lines of a batch, and where on them each segment lies."""

    ids: list[np.ndarray]  # of each segment
    places: list[tuple[int, int]]  # of each segment: its line, and the columns before it
    lengths: list[int]  # of each line

    @classmethod
    def of(cls, lines: Sequence[Sequence[np.ndarray]]) -> _Sheet:
        starts = [[0, *accumulate(map(len, line))] for line in lines]
        places = [(b, left) for b, line in enumerate(starts) for left in line[:-1]]
        return cls([ids for line in lines for ids in line], places, [line[-1] for line in starts])

    def fill(self, values: Sequence[np.ndarray], empty: int | bool) -> Tensor:
        """[B, T]: the values of each segment from its place on, `empty` elsewhere."""
        filled = np.full((len(self.lengths), max(self.lengths)), empty, bool if isinstance(empty, bool) else np.int64)
        for (b, left), own in zip(self.places, values, strict=True):
            filled[b, left : left + len(own)] = own
        return torch.from_numpy(filled)

    def tokens(self, pad_id: int) -> Tensor:
        return self.fill(self.ids, pad_id)

    def targets(self, values: Sequence[np.ndarray], empty: int | bool) -> Tensor:
        """[B, T]: what the values of each segment say of its next token."""
        return self.fill([own[1:] for own in values], empty)

    def attention_mask(self) -> Tensor:
        return self.fill([np.ones(len(ids), bool) for ids in self.ids], False)

    def position_ids(self) -> Tensor | None:
        """[B, T], or None where no line has several segments."""
        if len(self.ids) == len(self.lengths):
            return None
        ends = [(b, length) for b, length in enumerate(self.lengths)]
        widths = [max(self.lengths) - length for length in self.lengths]
        padded = _Sheet([*self.ids, *(np.zeros(width) for width in widths)], [*self.places, *ends], self.lengths)
        return padded.fill([np.arange(len(ids)) for ids in padded.ids], 0)


def _group_index(rows: Sequence[Row]) -> Tensor:
    """[E]: the segments of a bundle are one group, any other is its own."""
    groups: list[int] = []
    for row in rows:
        first = groups[-1] + 1 if groups else 0
        groups += [first if row.bundle else first + place for place in range(len(row.segments))]
    return torch.tensor(groups)


def _teacher_view(lines: Sequence[Sequence[Segment]], student: _Sheet) -> TeacherView:
    """The teacher's tokens of each segment; where it has none of its own, the student's, one for one."""
    views = [[segment.teacher or _same(segment) for segment in line] for line in lines]
    flat = [view for line in views for view in line]
    sheet = _Sheet.of([[view.ids for view in line] for line in views])
    foreign = any(view.mask is not None for view in flat)
    assert foreign == all(view.mask is not None for view in flat), (
        "a teacher has another tokenizer for all rows or none"
    )
    counted = [0, *accumulate(int(view.span.max(initial=-1)) + 1 for view in flat)]

    def through(spans: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [np.where(span < 0, -1, span + before) for span, before in zip(spans, counted, strict=False)]

    position = [_position(view, left) for view, (_, left) in zip(flat, sheet.places, strict=True)]
    return TeacherView(
        input_ids=sheet.tokens(0),
        attention_mask=sheet.attention_mask(),
        position_ids=sheet.position_ids(),
        position=student.fill(position, -1),
        targets=sheet.targets(sheet.ids, 0) if foreign else None,
        mask=sheet.targets([view.mask for view in flat if view.mask is not None], False) if foreign else None,
        span=student.targets(through([view.span for view in flat]), -1) if foreign else None,
        teacher_span=sheet.targets(through([view.teacher_span for view in flat]), -1) if foreign else None,
    )


def _same(segment: Segment) -> TeacherTokens:
    """What the student sees, as a view: every token but the first, which nothing predicts, is a span."""
    span = np.arange(-1, len(segment) - 1, dtype=np.int32)
    return TeacherTokens(ids=segment.ids, span=span, teacher_span=span)


def _position(view: TeacherTokens, left: int) -> np.ndarray:
    """[T - 1] of a segment: where on its line the teacher predicts what begins with the student's next token; -1 where
    that token begins no span. `left`: columns before the teacher's tokens."""
    position = np.full(len(view.span), -1, np.int64)
    _, first = np.unique(view.span, return_index=True)
    _, own = np.unique(view.teacher_span, return_index=True)
    first, own = first[view.span[first] >= 0], own[view.teacher_span[own] >= 0]
    position[first] = left + own - 1
    return position[1:]
