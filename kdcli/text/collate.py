"""Rows to a Batch: the only place that shifts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kdcli.api import Batch
from kdcli.store.tokens import Row, Segment


def collate(rows: Sequence[Row], *, pad_id: int) -> Batch:
    """Pad on the right, and put beside each token the one that follows it in its own example.

    A row's last token, and each packed example's last token, predict nothing. Packed rows carry position_ids, which
    start again at 0 with each example and with the padding, so that transformers keeps all of them apart. A bundle
    gives a line to each of its answers, and they are one group.
    """
    lines = [line for row in rows for line in row.lines()]
    size, width = len(lines), max(len(row) for row in rows)
    input_ids = torch.full((size, width), pad_id, dtype=torch.long)  # [B, T]
    targets = torch.full((size, width), pad_id, dtype=torch.long)  # [B, T]
    mask = torch.zeros(size, width, dtype=torch.bool)  # [B, T]
    attention_mask = torch.zeros(size, width, dtype=torch.bool)  # [B, T]
    segment = torch.full((size, width), -1, dtype=torch.long)  # [B, T]
    position_ids = torch.zeros(size, width, dtype=torch.long)  # [B, T]
    examples: list[Segment] = []
    for b, line in enumerate(lines):
        left = 0
        for example in line:
            ids, right = torch.from_numpy(example.ids.astype("int64")), left + len(example)
            input_ids[b, left:right] = ids
            targets[b, left : right - 1] = ids[1:]
            mask[b, left : right - 1] = torch.from_numpy(example.mask.copy())[1:]
            segment[b, left:right] = len(examples)
            position_ids[b, left:right] = torch.arange(right - left)
            examples.append(example)
            left = right
        attention_mask[b, :left] = True
        position_ids[b, left:] = torch.arange(width - left)
    packed = any(len(line) > 1 for line in lines)
    return Batch(
        input_ids=input_ids,
        targets=targets,
        mask=mask,
        attention_mask=attention_mask,
        segment=segment,
        weight=torch.tensor([example.weight for example in examples], dtype=torch.float32),
        position_ids=position_ids if packed else None,
        row=[example.key for example in examples],
        domain=[example.domain for example in examples],
        group=[example.group for example in examples],
        score=[example.score for example in examples],
        rejected=torch.tensor([example.rejected for example in examples])
        if any(example.rejected for example in examples)
        else None,
        group_index=_group_index(rows) if any(row.bundle for row in rows) else None,
    )


def _group_index(rows: Sequence[Row]) -> Tensor:
    """[E]: the segments of a bundle are one group, any other is its own."""
    groups: list[int] = []
    for row in rows:
        first = groups[-1] + 1 if groups else 0
        groups += [first if row.bundle else first + place for place in range(len(row.segments))]
    return torch.tensor(groups)
