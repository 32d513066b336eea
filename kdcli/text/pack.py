"""Packing: whole examples into rows of at most `capacity` tokens."""

from __future__ import annotations

import numpy as np

from kdcli.errors import ConfigError


def pack(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """A plan (order, starts): row i holds the examples order[starts[i]:starts[i + 1]].

    Best fit, longest first: each example goes to the fullest row that has room. Deterministic; time grows with
    examples x capacity / 64. Rows and the examples in them keep the order of the data.
    Raises ConfigError when an example is longer than `capacity`.
    """
    if len(lengths) and int(lengths.max()) > capacity:
        raise ConfigError(f"an example of {int(lengths.max())} tokens does not fit into rows of {capacity}")
    rows: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # open rows by the tokens left in them
    rooms = 0  # bit r is set when by_room[r] has a row
    for example in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[example])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                rooms &= ~(1 << room)
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(example)
        by_room[room - length].append(row)
        rooms |= 1 << (room - length)
    rows = sorted(sorted(row) for row in rows)
    order = np.asarray([example for row in rows for example in row], np.int64)
    return order, np.cumsum([0, *(len(row) for row in rows)], dtype=np.int64)
