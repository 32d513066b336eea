"""What is asked of a batch: whole sequences at the teacher's positions; and where the answers belong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from kdcli.api import Batch, TeacherView


@dataclass(frozen=True)
class AskedSequence:
    """A sequence of which some targets are wanted."""

    ids: list[int]  # up to the last target that is wanted
    first: int  # place in `ids` of the first such target
    row: int
    start: int  # column of the first id


@dataclass(frozen=True)
class Asked:
    """What is asked of a batch, at the teacher's positions."""

    wanted: Tensor  # [B, T'] bool
    sequences: list[AskedSequence]

    @classmethod
    def of(cls, batch: Batch) -> Asked:
        wanted, targets, inputs = (tensor.cpu() for tensor in _at_teacher(batch))
        view = batch if batch.teacher is None else batch.teacher
        sequences = []
        for row, start, stop in _stretches(view.attention_mask.cpu(), view.position_ids):
            places = torch.nonzero(wanted[row, start:stop])[:, 0].tolist()
            if places:
                last = start + places[-1]
                ids = [*inputs[row, start : last + 1].tolist(), int(targets[row, last])]
                kept = torch.tensor(places)
                following = torch.tensor(ids)[kept + 1]
                assert torch.equal(following, targets[row, start + kept]), "a target is the token after its position"
                sequences.append(AskedSequence(ids=ids, first=places[0] + 1, row=row, start=start))
        return cls(wanted.to(batch.input_ids.device), sequences)

    def spread(self, values: Sequence[Tensor], empty: float, *width: int) -> Tensor:
        """[N] or [N, K] of each sequence's targets from its first on -> [B, T'] or [B, T', K]; `empty` elsewhere."""
        dtype = values[0].dtype if values else torch.float32 if isinstance(empty, float) else torch.int64
        full = torch.full((*self.wanted.shape, *width), empty, dtype=dtype)
        for one, value in zip(self.sequences, values, strict=True):
            left = one.start + one.first - 1
            full[one.row, left : left + len(value)] = value
        full = full.to(self.wanted.device)
        return full.masked_fill(~self.wanted.view(*self.wanted.shape, *[1] * len(width)), empty)


def _at_teacher(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Which targets are wanted, [B, T'] bool; the targets and the ids, [B, T'], all at the teacher's positions."""
    view = batch.teacher
    if view is None:
        return batch.mask, batch.targets, batch.input_ids
    if view.targets is not None:
        assert view.mask is not None, "a view of another tokenizer says which targets are of the answer"
        return view.mask, view.targets, view.input_ids
    row, column = torch.nonzero(batch.mask & (view.position >= 0), as_tuple=True)
    place = view.position[row, column]
    wanted = torch.zeros_like(view.input_ids, dtype=torch.bool)
    targets = torch.zeros_like(view.input_ids)
    wanted[row, place] = True
    targets[row, place] = batch.targets[row, column]
    return wanted, targets, view.input_ids


def _stretches(attention_mask: Tensor, position_ids: Tensor | None) -> list[tuple[int, int, int]]:
    """(row, first column, column after the last) of each sequence: positions begin again with each one of a row."""
    found = []
    for row, mask in enumerate(attention_mask.tolist()):
        restarts = [False] * len(mask) if position_ids is None else (position_ids[row] == 0).tolist()
        edges = [
            column
            for column in range(len(mask) + 1)
            if column == len(mask) or column == 0 or mask[column] != mask[column - 1] or restarts[column]
        ]
        found += [(row, start, stop) for start, stop in pairwise(edges) if mask[start]]
    return found


def placed(values: Tensor, view: TeacherView | None) -> Tensor:
    """[B, T', ...] at the teacher's positions -> [B, T, ...] at the student's; as after no target where it has none."""
    if view is None:
        return values
    empty = -torch.inf if values.dim() == 3 and values.is_floating_point() else 0
    tail = values.shape[2:]
    index = view.position.clamp(min=0).view(*view.position.shape, *[1] * len(tail)).expand(*view.position.shape, *tail)
    missing = (view.position < 0).view(*view.position.shape, *[1] * len(tail))
    return values.gather(1, index).masked_fill(missing, empty)
