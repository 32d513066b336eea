"""What one number of an objective counts for in a step's mean: its units, reduction, domains and example weights."""

from __future__ import annotations

import torch
from torch import Tensor

from kdcli.api import Batch, Objective, Unit


def counts_of(batch: Batch, term: Objective) -> float:
    """What a term's sum is divided by, of this micro-batch: its targets, sequences or groups."""
    selected = _selected(batch, term)
    if term.unit is Unit.TOKEN and term.reduction != "token":
        selected = _targets(batch, selected) > 0
    return float(selected.sum())


def share_of(batch: Batch, term: Objective, count: float) -> Tensor:
    """What each unit's value adds to the step's mean, given the step's global `count`: [B, T], [E] or [G]; 0 where it
    is none of the term's units."""
    selected, sequences = _selected(batch, term), sequences_of(batch, term)
    weight = batch.weight[sequences]
    if term.unit is Unit.TOKEN and term.reduction == "sequence":
        weight = weight / _targets(batch, selected).clamp(min=1)[sequences]
    return torch.where(selected, weight / (count or 1.0), 0.0)


def sequences_of(batch: Batch, term: Objective) -> Tensor:
    """Which sequence (0..E-1) each unit is of, a group's first: [B, T] (any where there is none), [E] or [G]."""
    if term.unit is Unit.TOKEN:
        return batch.segment.clamp(min=0)
    everyone = torch.arange(batch.num_sequences, device=batch.segment.device)
    return everyone if term.unit is Unit.SEQUENCE else _first_of_groups(batch)


def _selected(batch: Batch, term: Objective) -> Tensor:
    """The units that a term counts and sums, bool: supervised, of its domains, and those it has a number for."""
    supervised = batch.targets_by_sequence() > 0  # [E]
    if term.domains:
        supervised &= torch.tensor([name in term.domains for name in batch.domain], device=supervised.device)
    units = term.units(batch)
    if term.unit is Unit.TOKEN:
        return units & batch.mask & supervised[batch.segment.clamp(min=0)]
    return units & (supervised if term.unit is Unit.SEQUENCE else supervised[_first_of_groups(batch)])


def _targets(batch: Batch, selected: Tensor) -> Tensor:
    """[E]: selected targets [B, T] of each sequence."""
    return torch.bincount(batch.segment[selected], minlength=batch.num_sequences)


def _first_of_groups(batch: Batch) -> Tensor:
    """[G]: the first sequence of each group."""
    groups = batch.groups()
    size = int(groups.max()) + 1
    index = torch.arange(len(groups), device=groups.device)
    return index.new_full((size,), len(groups)).scatter_reduce(0, groups, index, "amin")
