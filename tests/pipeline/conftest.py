"""Few questions are read ahead here, so that rows meet the edge of the window."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kdcli.pipeline import desk


@pytest.fixture(autouse=True, scope="module")
def window() -> Iterator[int]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(desk, "WINDOW", 16)
        yield 16
