"""Batches, teacher signals and student outputs as records of tensors: their numbers by path, rows of them, packed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import Tensor

from kdcli.api import Batch, StudentOutput, TeacherSignal, TeacherView

Record = TypeVar("Record")
BY_SEQUENCE = ("weight", "row", "domain", "group", "score", "rejected", "group_index")  # fields [E] of a batch
BY_TARGET = ("input_ids", "targets", "mask", "attention_mask", "segment", "old_logprobs")  # fields [B, T] of a batch


def mapped(record: Record, change: Callable[[str, Tensor], Tensor], path: str = "") -> Record:
    """A copy with every tensor of real numbers replaced by `change(path, tensor)`: `head.weight`, `attentions.0`."""
    if isinstance(record, Tensor):
        return change(path, record) if record.is_floating_point() else record
    if isinstance(record, tuple):
        return tuple(mapped(one, change, f"{path}.{i}") for i, one in enumerate(record))  # pyright: ignore
    if not is_dataclass(record) or isinstance(record, type):
        return record
    dot = f"{path}." if path else ""
    parts = {f.name: mapped(getattr(record, f.name), change, dot + f.name) for f in fields(record) if f.name[0] != "_"}
    return type(record)(**parts)


def numbers(record: Any) -> dict[str, Tensor]:
    """Path -> tensor of real numbers."""
    found: dict[str, Tensor] = {}

    def note(path: str, tensor: Tensor) -> Tensor:
        found[path] = tensor
        return tensor

    mapped(record, note)
    return found


def with_numbers(record: Record, changed: Mapping[str, Tensor]) -> Record:
    """A copy with the tensors of these paths."""
    return mapped(record, lambda path, tensor: changed.get(path, tensor))


def plain(record: Any) -> Any:
    """The same as SimpleNamespace and numpy arrays, for oracles."""
    if isinstance(record, Tensor):
        return record.detach().numpy()
    if isinstance(record, tuple):
        return tuple(map(plain, record))
    if is_dataclass(record) and not isinstance(record, type):
        return SimpleNamespace(**{f.name: plain(getattr(record, f.name)) for f in fields(record) if f.name[0] != "_"})
    return record


def sequences(batch: Batch, chosen: Sequence[int]) -> Batch:
    """Sequences `chosen` of a batch that is not packed, as a batch of their own, cut to its longest."""
    index = torch.tensor(chosen)
    width = int(batch.attention_mask[index].sum(1).max())
    cut: dict[str, Any] = {n: rows(getattr(batch, n), index, width) for n in BY_TARGET}
    for name in BY_SEQUENCE:
        whole = getattr(batch, name)
        cut[name] = whole[index] if isinstance(whole, Tensor) else [whole[i] for i in chosen] if whole else whole
    cut["segment"] = torch.where(cut["segment"] < 0, -1, torch.arange(len(chosen)).unsqueeze(1))
    if batch.group_index is not None:
        cut["group_index"] = torch.unique(cut["group_index"], return_inverse=True)[1]
    view = None if batch.teacher is None else _rows_of_view(batch.teacher, index, width)
    return replace(batch, **cut, teacher=view)


def rows(values: Any, index: Tensor, width: int, axes: int = 1) -> Any:
    """Rows of [B, T, ...], cut to `width` positions; with two axes of [B, ..., T, T]. None stays None."""
    if values is None:
        return None
    return values[index][..., :width, :width] if axes == 2 else values[index][:, :width]


def packed(batch: Batch) -> Batch:
    """All sequences behind each other in one row, without padding."""
    keep = batch.attention_mask
    flat = {name: _flat(getattr(batch, name), keep) for name in BY_TARGET}
    view = None if batch.teacher is None else _packed_view(batch.teacher, keep)
    return replace(batch, **flat, position_ids=_flat(_places(keep), keep), teacher=view)


def packed_states(record: Record, batch: Batch) -> Record:
    """What a model computed for rows, as it would for `packed(batch)`."""
    keep, view = batch.attention_mask, batch.teacher
    apart = batch.segment[keep].unsqueeze(0) != batch.segment[keep].unsqueeze(1)

    def change(path: str, tensor: Tensor) -> Tensor:
        name = path.split(".")[0]
        if name in ("head", "embedding", "reward"):
            return tensor
        if name in ("own_hidden", "own_logprobs"):
            assert view is not None, "a teacher of another tokenizer has its own view"
            return _flat(tensor, view.attention_mask)
        if name == "attentions":
            joined = torch.zeros(tensor.shape[1], *apart.shape, dtype=tensor.dtype)
            starts = [0, *keep.sum(1).cumsum(0).tolist()]
            for b, start in enumerate(starts[:-1]):
                size = starts[b + 1] - start
                joined[:, start : start + size, start : start + size] = tensor[b][:, keep[b]][:, :, keep[b]]
            return joined.masked_fill(apart, 0.0).unsqueeze(0)
        return _flat(tensor, keep)

    return mapped(record, change)


def states_of_sequences(record: Record, batch: Batch, chosen: Sequence[int]) -> Record:
    """What a model computed for rows, for `sequences(batch, chosen)`."""
    index = torch.tensor(chosen)
    width = int(batch.attention_mask[index].sum(1).max())
    own_width = 0 if batch.teacher is None else int(batch.teacher.attention_mask[index].sum(1).max())

    def change(path: str, tensor: Tensor) -> Tensor:
        name = path.split(".")[0]
        if name in ("head", "embedding"):
            return tensor
        if name == "reward":
            return tensor[index]
        return rows(tensor, index, own_width if name.startswith("own") else width, 2 if name == "attentions" else 1)

    return mapped(record, change)


def as_student(signal: TeacherSignal, like: StudentOutput) -> StudentOutput:
    """The output of a student that computes what the teacher does."""
    theirs = numbers(signal)
    if "reference_logprobs" in theirs and "logprobs" not in theirs:
        theirs["logprobs"] = theirs["reference_logprobs"]
    return with_numbers(like, {path: theirs[path] for path in numbers(like) if path in theirs})


def _flat(values: Tensor | None, keep: Tensor) -> Any:
    return None if values is None else values[keep].unsqueeze(0)


def _places(keep: Tensor) -> Tensor:
    return torch.arange(keep.shape[1]).expand_as(keep)


def _packed_view(view: TeacherView, keep: Tensor) -> TeacherView:
    own = view.attention_mask
    start = (own.sum(1).cumsum(0) - own.sum(1)).unsqueeze(1)
    names = ("input_ids", "attention_mask", "targets", "mask", "teacher_span")
    flat = {name: _flat(getattr(view, name), own) for name in names}
    position = torch.where(view.position < 0, -1, view.position + start)
    places = _flat(_places(own), own)
    return replace(view, **flat, position=_flat(position, keep), span=_flat(view.span, keep), position_ids=places)


def _rows_of_view(view: TeacherView, index: Tensor, width: int) -> TeacherView:
    own_width = int(view.attention_mask[index].sum(1).max())
    names = ("input_ids", "attention_mask", "targets", "mask", "teacher_span")
    cut = {name: rows(getattr(view, name), index, own_width) for name in names}
    cut |= {name: rows(getattr(view, name), index, width) for name in ("position", "span")}
    if view.span is not None:
        known = torch.unique(torch.cat([cut["span"].flatten(), cut["teacher_span"].flatten()]))
        known = known[known >= 0]
        for name in ("span", "teacher_span"):
            cut[name] = torch.where(cut[name] < 0, -1, torch.searchsorted(known, cut[name].clamp(min=0)))
    return replace(view, **cut)
