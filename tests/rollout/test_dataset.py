"""Off-policy text is the data set's, untouched."""

from __future__ import annotations

from typing import cast

import numpy as np

from kdcli.api import Student
from kdcli.rollout.dataset import Dataset
from kdcli.store.tokens import Row, Segment
from kdcli.text.collate import collate


def test_the_batch_is_the_one_that_was_drawn() -> None:
    batch = collate([Row((Segment(ids=np.arange(4, dtype=np.int32), mask=np.ones(4, bool), key="a"),))], pad_id=0)
    assert Dataset()(batch, cast(Student, None), step=3) is batch
    assert not batch.on_policy
    assert Dataset().state_dict() == {}
