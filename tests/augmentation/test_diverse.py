"""Diversity: so many rows as asked for, in their order, groups whole, and farther apart than chance."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdcli.api import Example
from kdcli.augmentation.diverse import Diverse, balanced, k_centre
from kdcli.errors import ConfigError
from tests.desks import FakeDesk, run

TOPICS = ("alpha beta gamma delta", "rain snow wind cloud", "piano violin drum flute")


def rows(sizes: tuple[int, ...] = (40, 4, 4)) -> list[Example]:
    draw = np.random.default_rng(0)
    found = [
        Example(prompt=" ".join(draw.choice(topic.split(), 6)), response="x", meta={"topic": number})
        for number, (topic, size) in enumerate(zip(TOPICS, sizes, strict=True))
        for _ in range(size)
    ]
    return [found[i] for i in draw.permutation(len(found))]


def unit(draw: np.random.Generator, count: int, width: int) -> np.ndarray:
    vectors = draw.normal(size=(count, width)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize("method", ["k_centre", "cluster"])
@pytest.mark.parametrize("settings", [dict(count=9), dict(share=9 / 48), dict(count=100)])
def test_so_many_rows_are_kept_in_order_and_the_same_each_time(method: Any, settings: Any, tmp_path: Path) -> None:
    given = rows()
    step = Diverse(method=method, **settings)
    kept = run(step, given, folder=tmp_path)
    assert len(kept) == min(settings.get("count", 9), 48)
    places = iter(given)
    assert all(row in places for row in kept)
    assert isinstance(step.desk, FakeDesk)
    assert len(step.desk.set_aside) == len(given) - len(kept)
    assert run(Diverse(method=method, **settings), given, folder=tmp_path) == kept
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", ["k_centre", "cluster"])
def test_small_topics_are_kept_that_chance_would_lose(method: Any, tmp_path: Path) -> None:
    """Six of 48 rows at random hold both topics of four rows with a probability of 0.13."""
    kept = run(Diverse(count=6, method=method), rows(), folder=tmp_path)
    assert {row.meta["topic"] for row in kept} == {0, 1, 2}


def test_k_centre_is_within_twice_the_best_cover() -> None:
    """The bound of the greedy choice, against all subsets."""
    draw = np.random.default_rng(1)
    for _ in range(10):
        vectors = unit(draw, 9, 3)
        apart = np.sqrt(np.maximum(2 - 2 * vectors @ vectors.T, 0))

        def cover(chosen: Any, apart: np.ndarray = apart) -> float:
            return float(apart[:, list(chosen)].min(axis=1).max())

        best = min(cover(chosen) for chosen in itertools.combinations(range(9), 3))
        found = k_centre(vectors, 3)
        assert len(set(found.tolist())) == 3
        assert cover(found) <= 2 * best + 1e-6


def test_k_centre_takes_equal_rows_last_and_all_of_them_in_the_end() -> None:
    vectors = np.repeat(unit(np.random.default_rng(2), 3, 4), 3, axis=0)
    found = k_centre(vectors, 9)
    assert {int(i) // 3 for i in found[:3]} == {0, 1, 2}
    assert sorted(found.tolist()) == list(range(9))


def test_clusters_give_in_turn() -> None:
    draw = np.random.default_rng(3)
    centres = np.eye(8, dtype=np.float32)[:3]
    vectors = np.concatenate([centres[i] + 0.05 * unit(draw, size, 8) for i, size in enumerate((30, 5, 5))])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    found = balanced(vectors, 9, 3, np.random.default_rng(0))
    sizes = [int(((found >= low) & (found < high)).sum()) for low, high in ((0, 30), (30, 35), (35, 40))]
    assert sizes == [3, 3, 3]


@pytest.mark.parametrize("method", ["k_centre", "cluster"])
def test_groups_count_once_and_stay_whole(method: Any, tmp_path: Path) -> None:
    given = [
        Example(prompt=row.prompt, response=answer, group=f"g{i}") for i, row in enumerate(rows()) for answer in "xyz"
    ]
    kept = run(Diverse(count=5, method=method), given, folder=tmp_path)
    assert len(kept) == 15
    groups = [row.group for row in kept]
    assert [groups[i : i + 3] for i in range(0, 15, 3)] == [[group] * 3 for group in dict.fromkeys(groups)]


def test_what_a_row_lacks_is_said_and_nothing_of_a_row_is_lost_on_the_way(tmp_path: Path) -> None:
    full = Example(
        prompt="é\n\u2028", response="x", group="1", score=0.5, weight=2.0, domain="d", meta={"a": [1, {"b": None}]}
    )
    step = Diverse(share=1.0)
    assert run(step, [full, Example(text="t")], folder=tmp_path) == [full]
    assert isinstance(step.desk, FakeDesk)
    assert step.desk.reasons == ["lacks a field"]
    assert run(Diverse(count=1), [], folder=tmp_path) == []


def test_a_rehearsal_keeps_all(tmp_path: Path) -> None:
    assert run(Diverse(count=1), rows(), folder=tmp_path, rehearsal=True) == rows()


@pytest.mark.parametrize("settings", [{}, dict(count=1, share=0.5), dict(share=0.0), dict(count=0), dict(share=1.5)])
def test_bad_settings_name_the_way_out(settings: Any) -> None:
    with pytest.raises(ConfigError, match="count"):
        Diverse(**settings)


def test_an_embedding_that_is_none_is_told_of_before_rows_are_read(tmp_path: Path) -> None:
    def unread() -> Any:
        raise AssertionError("rows were read")
        yield

    with pytest.raises(ConfigError, match="no folder of an encoder"):
        run(Diverse(count=1, embed="no/folder"), unread(), folder=tmp_path)
