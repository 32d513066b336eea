"""Rows to a Batch: the only place that shifts."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kdcli.api import Batch
from kdcli.store.tokens import Row


def collate(rows: Sequence[Row], *, pad_id: int) -> Batch:
    """Pad on the right, and put beside each token the one that follows it in its own example.

    A row's last token, and each packed example's last token, predict nothing. Packed rows carry position_ids, which
    start again at 0 with each example and with the padding, so that transformers keeps all of them apart.
    """
    size, width = len(rows), max(len(row) for row in rows)
    input_ids = torch.full((size, width), pad_id, dtype=torch.long)  # [B, T]
    targets = torch.full((size, width), pad_id, dtype=torch.long)  # [B, T]
    mask = torch.zeros(size, width, dtype=torch.bool)  # [B, T]
    attention_mask = torch.zeros(size, width, dtype=torch.bool)  # [B, T]
    segment = torch.full((size, width), -1, dtype=torch.long)  # [B, T]
    position_ids = torch.zeros(size, width, dtype=torch.long)  # [B, T]
    examples = []
    for b, row in enumerate(rows):
        left = 0
        for example in row.segments:
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
    packed = any(len(row.segments) > 1 for row in rows)
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
    )
