"""Packing: whole examples into rows of at most `capacity` tokens."""

from __future__ import annotations

from array import array

import numpy as np

from kdcli.errors import ConfigError

BLOCK = 65536  # examples


def pack(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """A plan (order, starts): row i holds the examples order[starts[i]:starts[i + 1]].

    Best fit, longest first: each example goes to the fullest row that has room. Deterministic; time grows with
    examples x capacity / 64. Rows and the examples in them keep the order of the data.
    Raises ConfigError when an example is longer than `capacity`.
    """
    if len(lengths) and int(lengths.max()) > capacity:
        raise ConfigError(f"an example of {int(lengths.max())} tokens does not fit into rows of {capacity}")
    row_of = np.empty(len(lengths), np.int64)
    by_room = [array("q") for _ in range(capacity + 1)]  # open rows by the tokens left in them
    rooms = 0  # bit r is set when by_room[r] has a row
    rows = 0
    longest_first = np.argsort(-lengths, kind="stable")
    for start in range(0, len(lengths), BLOCK):  # of few at a time, because a number of Python's takes four of numpy's
        for example in longest_first[start : start + BLOCK].tolist():
            length = int(lengths[example])
            fitting = rooms >> length
            if fitting:
                room = length + (fitting & -fitting).bit_length() - 1
                row = by_room[room].pop()
                if not by_room[room]:
                    rooms &= ~(1 << room)
            else:
                room, row = capacity, rows
                rows += 1
            row_of[example] = row
            by_room[room - length].append(row)
            rooms |= 1 << (room - length)
    first = np.unique(row_of, return_index=True)[1]  # example of each row
    place = np.empty(rows, np.int64)
    place[np.argsort(first)] = np.arange(rows)
    place_of = place[row_of]
    starts = np.concatenate([[0], np.cumsum(np.bincount(place_of, minlength=rows))])
    return np.argsort(place_of, kind="stable"), starts.astype(np.int64)
