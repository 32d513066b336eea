"""Values against annotations: what fits, what does not, and how it is said."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcli.config.values import describe, problems_of

SAMPLES: dict[Any, st.SearchStrategy[Any]] = {
    int: st.integers(),
    float: st.floats() | st.integers(),
    bool: st.booleans(),
    str: st.text().filter(lambda s: s != "???"),
    int | None: st.none() | st.integers(),
    Literal["none", "t2"]: st.sampled_from(["none", "t2"]),
    Sequence[int]: st.lists(st.integers()),
    list[float]: st.lists(st.floats()),
    tuple[float, float]: st.lists(st.floats(), min_size=2, max_size=2),
    Mapping[str, float]: st.dictionaries(st.text(), st.floats()),
    str | Sequence[str]: st.text().filter(lambda s: s != "???") | st.lists(st.just("a")),
    Mapping[str, Any] | None: st.none() | st.dictionaries(st.text(), st.integers() | st.booleans()),
}


@pytest.mark.parametrize("annotation", SAMPLES, ids=str)
@given(data=st.data())
def test_values_of_a_type_fit_it(annotation: Any, data: st.DataObject) -> None:
    assert problems_of(data.draw(SAMPLES[annotation]), annotation, "key") == []


@pytest.mark.parametrize(
    ("value", "annotation", "says"),
    [
        (True, int, "key: is true, but must be a whole number"),
        (1.0, int, "key: is 1.0, but must be a whole number"),
        (False, float, "key: is false, but must be a number"),
        ("1e-3x", float, "key: is '1e-3x', but must be a number"),
        (1, bool, "key: is 1, but must be true or false"),
        (3, str, "key: is 3, but must be text"),
        (None, str, "key: is null, but must be text"),
        ("t3", Literal["none", "t2"], "key: is 't3', but must be one of none, t2"),
        (1, Literal[True, False], "key: is 1, but must be one of True, False"),
        (1.5, int | None, "key: is 1.5, but must be a whole number or null"),
        ("abc", Sequence[str], "key: is 'abc', but must be a list, each text"),
        ([1, "a"], Sequence[int], "key.1: is 'a', but must be a whole number"),
        ({"code": "x"}, Mapping[str, float], "key.code: is 'x', but must be a number"),
        ([0.9], tuple[float, float], "key: has 1 elements, but must have 2"),
        ({"a": [True]}, Mapping[str, list[int]] | None, "key.a.0: is true, but must be a whole number"),
        ("???", str, "key: must be given; add key=… to the command"),
    ],
)
def test_the_message_names_value_and_what_is_valid(value: Any, annotation: Any, says: str) -> None:
    assert problems_of(value, annotation, "key") == [says]


def test_a_reference_to_the_environment_fits_every_type() -> None:
    assert problems_of("${oc.env:SIZE}", int, "key") == []


def test_types_that_no_config_can_hold_are_left_out_of_the_words() -> None:
    from torch import Tensor

    assert describe(float | Tensor) == "a number"
    assert problems_of("abc", float | Tensor, "lr") == ["lr: is 'abc', but must be a number"]
