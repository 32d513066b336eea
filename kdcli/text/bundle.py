"""Bundles: the answers that a loss compares, kept together in one row of the loader."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def bundle(
    rejected: Sequence[bool], groups: Sequence[str | None], scores: Sequence[float | None]
) -> tuple[np.ndarray, np.ndarray]:
    """A plan (order, starts): row i holds the segments order[starts[i]:starts[i + 1]].

    A rejected answer follows the chosen one before it, whatever their group. Other segments of equal group that have a
    score are one row, the best first (equal scores in the order of the data), where the first of them stood. All else
    is a row of its own.
    """
    rows: list[list[int]] = []
    by_group: dict[str, list[int]] = {}
    for segment, worse in enumerate(rejected):
        group = groups[segment]
        if worse:
            rows[-1].append(segment)
            continue
        chosen = segment + 1 < len(rejected) and rejected[segment + 1]
        if group is None or scores[segment] is None or chosen:
            rows.append([segment])
        elif group in by_group:
            by_group[group].append(segment)
        else:
            rows.append(by_group.setdefault(group, [segment]))
    for members in by_group.values():
        members.sort(key=lambda segment: -(scores[segment] or 0.0))
    order = np.asarray([segment for row in rows for segment in row], np.int64)
    return order, np.cumsum([0, *(len(row) for row in rows)], dtype=np.int64)
