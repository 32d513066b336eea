"""The order of the data is a function of the seed, the step and the weights, and of nothing else."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcli.api import Batch
from kdcli.errors import ConfigError
from kdcli.store.tokens import Row, Segment
from kdcli.train.loader import Loader, permuted

WEIGHTS = {"code": 0.6, "math": 0.3, "prose": 0.1}


def rows(name: str, count: int) -> list[Row]:
    lengths = [2 + (7 * number) % 5 for number in range(count)]
    return [
        Row((Segment(ids=np.arange(n, dtype=np.int32), mask=np.ones(n, bool), key=f"{name}{number}", domain=name),))
        for number, n in enumerate(lengths)
    ]


DATA = {"code": rows("code", 17), "math": rows("math", 5), "prose": rows("prose", 3)}


def loader(**changes: Any) -> Loader:
    given_settings = {"batch_size": 8, "micro_size": 2, "pad_id": 0, "seed": 1, "weights": WEIGHTS, **changes}
    return Loader(given_settings.pop("rows", DATA), **given_settings)


def keys(batches: list[Batch]) -> list[list[str]]:
    return [batch.row for batch in batches]


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_micro_batches_do_not_depend_on_the_number_of_ranks(world_size: int) -> None:
    alone, ranks = loader(), [loader(rank=rank, world_size=world_size) for rank in range(world_size)]
    for step in range(20):
        parts = [keys(rank.next(step)) for rank in ranks]
        assert {len(part) for part in parts} == {4 // world_size}
        dealt = [part[turn] for turn in range(4 // world_size) for part in parts]
        assert dealt == keys(alone.next(step))


@pytest.mark.parametrize("stop", [0, 1, 7])
def test_resume_is_exact(stop: int) -> None:
    whole, first, second = loader(), loader(), loader(weights={"code": 1, "math": 0, "prose": 0})
    expected = [keys(whole.next(step)) for step in range(12)]
    found = [keys(first.next(step)) for step in range(stop)]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert found + [keys(second.next(step)) for step in range(stop, 12)] == expected


def test_resume_may_change_the_number_of_ranks() -> None:
    whole, first = loader(), loader()
    expected = [keys(whole.next(step)) for step in range(8)]
    for step in range(4):
        first.next(step)
    ranks = [loader(rank=rank, world_size=2) for rank in range(2)]
    for rank in ranks:
        rank.load_state_dict(first.state_dict())
    for step in range(4, 8):
        one, two = (keys(rank.next(step)) for rank in ranks)
        assert [part for pair in zip(one, two, strict=True) for part in pair] == expected[step]


def test_another_seed_is_another_order() -> None:
    assert keys(loader().next(0)) != keys(loader(seed=2).next(0))


def test_each_epoch_gives_each_row_once_in_another_order() -> None:
    one = loader(rows={"code": DATA["code"]}, weights={"code": 1}, batch_size=17, micro_size=17)
    epochs = [keys(one.next(step))[0] for step in range(3)]
    assert all(sorted(epoch) == sorted(row.segments[0].key for row in DATA["code"]) for epoch in epochs)
    assert one.epochs == {"code": 3.0}
    order = loader(rows={"code": rows("code", 17)}, weights={"code": 1}, batch_size=1, micro_size=1)
    drawn = [keys(order.next(step))[0][0] for step in range(34)]
    assert drawn[:17] != drawn[17:]


def test_domains_are_drawn_by_weight() -> None:
    """20,000 draws: three standard deviations of a share are at most 3 * sqrt(.25 / 20,000) = .011."""
    one = loader(batch_size=200, micro_size=200)
    counts = Counter(name for step in range(100) for batch in one.next(step) for name in batch.domain)
    for name, weight in WEIGHTS.items():
        assert counts[name] / 20_000 == pytest.approx(weight, abs=0.011)
    assert one.drawn == dict(counts)


def test_hamilton_gives_each_domain_its_rows_rounded_up_or_down() -> None:
    one = loader(quota="hamilton", batch_size=20, micro_size=20)
    for step in range(50):
        counts = Counter(name for batch in one.next(step) for name in batch.domain)
        for name, weight in WEIGHTS.items():
            assert math.floor(20 * weight - 1e-9) <= counts[name] <= math.ceil(20 * weight + 1e-9)


@settings(max_examples=30, deadline=None)
@given(
    shares=st.lists(st.floats(0.001, 1.0), min_size=3, max_size=3),
    batch_size=st.integers(1, 9),
    seed=st.integers(0, 1000),
)
def test_hamilton_keeps_the_long_run_share_of_small_domains(shares: list[float], batch_size: int, seed: int) -> None:
    """After 400 steps no domain is five rows from steps x batch x weight; independent draws would be off by ten."""
    weights = dict(zip(WEIGHTS, shares, strict=True))
    one = loader(quota="hamilton", batch_size=batch_size, micro_size=batch_size, weights=weights, seed=seed)
    for step in range(400):
        one.next(step)
    for name, share in one.weights.items():
        assert one.drawn[name] == pytest.approx(400 * batch_size * share, abs=5)


def test_hamilton_is_a_function_of_the_seed_the_step_and_the_weights() -> None:
    """Whatever came before, and for any number of ranks."""
    one, other = loader(quota="hamilton"), loader(quota="hamilton", weights={"code": 0, "math": 1, "prose": 1})
    ranks = [loader(quota="hamilton", rank=rank, world_size=2) for rank in range(2)]
    for step in range(3):
        whole = keys(one.next(step))
        parts = [keys(rank.next(step)) for rank in ranks]
        assert [parts[turn % 2][turn // 2] for turn in range(4)] == whole
        other.next(step)
    other.weights = WEIGHTS
    assert one._domains(7) == other._domains(7)
    of_seeds = [[loader(quota="hamilton", seed=seed)._domains(step) for step in range(20)] for seed in (1, 2)]
    assert of_seeds[0] == [one._domains(step) for step in range(20)] != of_seeds[1]


def test_weights_come_back_to_the_last_bit() -> None:
    one = loader(weights={"code": 0.1, "math": 0.7, "prose": 0.1})
    odd = {"code": 0.6, "math": 0.3, "prose": 0.1}  # in floating point they sum to a little less than 1
    state = one.state_dict() | {"weights": odd}
    one.load_state_dict(state)
    assert one.weights == odd
    one.weights = odd
    assert one.weights != odd, "else this test would show nothing"


def test_small_domains_wrap_around_by_themselves() -> None:
    """Prose has 3 rows: it is in its third epoch while code is in its first, and each epoch has each row once."""
    one = loader(quota="hamilton", batch_size=4, micro_size=4, weights={"code": 0.5, "math": 0.0, "prose": 0.5})
    drawn = [name for step in range(4) for batch in one.next(step) for name in batch.row if "prose" in name]
    assert sorted(drawn[:3]) == sorted(drawn[3:6]) == ["prose0", "prose1", "prose2"]
    assert one.epochs == {"code": 8 / 17, "math": 0.0, "prose": 8 / 3}


def test_a_domain_of_weight_zero_is_never_drawn_and_may_be_empty() -> None:
    one = loader(rows={**DATA, "none": []}, weights={"none": 0, "code": 0, "math": 1, "prose": 1})
    drawn = {name for step in range(50) for batch in one.next(step) for name in batch.domain}
    assert drawn == {"math", "prose"}


def test_new_weights_act_on_the_next_step() -> None:
    one, other = loader(), loader()
    assert keys(one.next(0)) == keys(other.next(0))
    one.weights = {"code": 0, "math": 0, "prose": 5}
    assert one.weights == {"code": 0, "math": 0, "prose": 1}
    assert {name for batch in one.next(1) for name in batch.domain} == {"prose"}
    assert one.state_dict()["weights"]["prose"] == 1.0


def test_fewer_rows_than_a_batch_come_again() -> None:
    one = loader(rows={"prose": DATA["prose"]}, weights={"prose": 1}, batch_size=6, micro_size=6)
    assert Counter(keys(one.next(0))[0]) == {f"prose{number}": 2 for number in range(3)}


def test_a_step_costs_no_more_for_a_larger_data_set() -> None:
    class Endless(list[Row]):
        """A trillion rows, of which only those asked for exist."""

        def __len__(self) -> int:
            return 10**12

        def __getitem__(self, index: Any) -> Any:
            assert 0 <= index < 10**12
            return DATA["code"][0]

    assert len(loader(rows={"code": Endless()}, weights={"code": 1}).next(0)) == 4


def test_rows_of_like_length_share_a_micro_batch() -> None:
    lengths = [batch.attention_mask.sum(1).tolist() for batch in loader().next(0)]
    flat = [length for part in lengths for length in part]
    assert flat == sorted(flat, reverse=True)


@given(size=st.integers(1, 300), key=st.integers(0, 2**64 - 1))
def test_a_permutation_is_one(size: int, key: int) -> None:
    assert sorted(permuted(index, size, key) for index in range(size)) == list(range(size))


def test_a_permutation_is_the_same_everywhere() -> None:
    """Values of this code on the day it was written: a change would reorder the data of runs that resume."""
    assert [permuted(index, 10, 7) for index in range(10)] == [1, 5, 3, 6, 0, 9, 7, 4, 2, 8]


def test_permutations_put_each_index_everywhere() -> None:
    """10,000 keys, 10 places: chi-squared of 9 degrees of freedom stays below 33.7 with probability .9999."""
    counts = Counter(permuted(0, 10, key) for key in range(10_000))
    assert sum((counts[place] - 1000) ** 2 / 1000 for place in range(10)) < 33.7


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 7}, r"batch.size=7 .* multiple of 2"),
        ({"world_size": 3}, r"3 processes .* multiple of 6"),
        ({"weights": {"code": 1}}, "weights are for code"),
        ({"weights": {**WEIGHTS, "math": -1}}, "math is -1"),
        ({"weights": {**WEIGHTS, "math": float("nan")}}, "math is nan"),
        ({"weights": dict.fromkeys(WEIGHTS, 0.0)}, "all domain weights are 0"),
        ({"rows": {**DATA, "math": []}}, "math has weight 0.3 and no rows"),
    ],
)
def test_what_cannot_be_drawn_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        loader(**settings)


def test_other_data_than_the_checkpoint_s_are_refused() -> None:
    state = loader().state_dict()
    with pytest.raises(ConfigError, match=r"data have changed .* domain math had 5 rows, and has 6\."):
        loader(rows={**DATA, "math": rows("math", 6)}).load_state_dict(state)


def test_other_rows_of_the_same_number_are_refused_by_domain() -> None:
    content = {"code": "a", "math": "b", "prose": "c"}
    state = json.loads(json.dumps(loader(content=content).state_dict()))
    loader(content=content).load_state_dict(state)
    with pytest.raises(ConfigError, match="domain prose has other rows than then, though as many"):
        loader(content=content | {"prose": "d"}).load_state_dict(state)


def test_a_fault_can_be_injected_where_the_next_batch_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDCLI_TESTING", "1")
    monkeypatch.setenv("KDCLI_FAULT", "data.next:rank=0:step=2:raise")
    one = loader()
    one.next(0)
    one.next(1)
    with pytest.raises(RuntimeError, match=r"data\.next"):
        one.next(2)
