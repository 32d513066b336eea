"""Packing loses nothing, overfills nothing and is the same every time."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcli.errors import ConfigError
from kdcli.text.pack import pack

LENGTHS = st.lists(st.integers(1, 40), max_size=80).map(lambda lengths: np.asarray(lengths, np.int64))


@given(lengths=LENGTHS)
def test_every_example_is_in_one_row_and_no_row_is_too_long(lengths: np.ndarray) -> None:
    order, starts = pack(lengths, 40)
    assert sorted(order.tolist()) == list(range(len(lengths)))
    rows = [order[a:b] for a, b in pairwise(starts)]
    assert all(len(row) and lengths[row].sum() <= 40 for row in rows)


@given(lengths=LENGTHS)
def test_no_two_rows_would_fit_into_one(lengths: np.ndarray) -> None:
    order, starts = pack(lengths, 40)
    sums = sorted(int(lengths[order[a:b]].sum()) for a, b in pairwise(starts))
    assert len(sums) < 2 or sums[0] + sums[1] > 40


def test_a_plan_worked_out_by_hand() -> None:
    """Longest first into rows of 10: 7 | 6 | 4 joins 6 | 3 joins 7."""
    order, starts = pack(np.asarray([3, 6, 7, 4]), 10)
    assert order.tolist() == [0, 2, 1, 3]
    assert starts.tolist() == [0, 2, 4]


def test_an_example_that_fits_no_row_is_refused() -> None:
    with pytest.raises(ConfigError, match="11 tokens"):
        pack(np.asarray([11]), 10)
