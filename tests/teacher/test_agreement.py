"""Every way to ask one teacher gives the loss and gradient that its bound claims; the page shows what was measured."""

from __future__ import annotations

import pytest

from benchmarks import agreement
from kdcli.store import paths

SETTING = agreement.Setting(
    str(paths.resolve("recipes://data/tiny_teacher")), "recipes://data/mini/valid", rows=6, length=32
)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, agreement.Row]:
    return {row.way.name: row for row in agreement.measure(SETTING, tmp_path_factory.mktemp("agreement"))}


@pytest.mark.parametrize("name", [way.name for way in agreement.WAYS])
def test_a_way_of_asking_keeps_its_bound(rows: dict[str, agreement.Row], name: str) -> None:
    row = rows[name]
    assert row.held, agreement.cells(row, rows[agreement.LOCAL].found.held)


def test_a_teacher_split_over_two_processes_leaves_each_half_of_the_layers(rows: dict[str, agreement.Row]) -> None:
    whole, split = (rows[name].found.held for name in (agreement.LOCAL, "hf_sharded on 2 processes"))
    assert split < 0.8 * whole, "half of the layers, and the head that is whole"


def test_the_page_has_a_line_of_each_way() -> None:
    page = agreement.PAGE.read_text("utf-8")
    told = [line.split(" | ")[0].removeprefix("| ") for line in page.partition(agreement.BEGIN)[2].splitlines()]
    assert {way.name for way in agreement.WAYS} <= set(told), "python -m benchmarks.agreement --write"
    assert "MISSED" not in page
