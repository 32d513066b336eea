"""Weights that no loss moves."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcli.api import DomainLoss
from kdcli.domain_scheduler.natural import Natural
from kdcli.domain_scheduler.static import Static
from kdcli.errors import ConfigError

SIZES = {"code": 30, "prose": 10}


def test_natural_weights_are_shares_of_rows() -> None:
    assert Natural().initial(SIZES) == {"code": 0.75, "prose": 0.25}


@given(weights=st.fixed_dictionaries({"code": st.floats(0.1, 9), "prose": st.floats(0, 9)}))
def test_static_weights_sum_to_one_and_keep_their_ratio(weights: dict[str, float]) -> None:
    found = Static(weights=weights).initial(SIZES)
    assert sum(found.values()) == pytest.approx(1.0)
    assert found["prose"] * weights["code"] == pytest.approx(found["code"] * weights["prose"])


def test_a_domain_left_out_is_not_drawn() -> None:
    assert Static(weights={"prose": 2}).initial(SIZES) == {"code": 0.0, "prose": 1.0}


@pytest.mark.parametrize("scheduler", [Natural(), Static(weights={"code": 1})])
def test_losses_move_nothing(scheduler: Natural | Static) -> None:
    weights = scheduler.initial(SIZES)
    assert scheduler.interval == 0
    assert scheduler.update(weights, {"code": DomainLoss(student=9.0), "prose": DomainLoss(student=0.1)}) == weights


@pytest.mark.parametrize("weights", [{}, {"code": 0.0}, {"code": -1.0}, {"code": float("nan")}, {"code": float("inf")}])
def test_weights_that_mean_nothing_are_refused(weights: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=r"domain_scheduler\.weights"):
        Static(weights=weights)


def test_an_unknown_domain_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match=r"weights.coed: .*did you mean code"):
        Static(weights={"coed": 1.0}).initial(SIZES)
