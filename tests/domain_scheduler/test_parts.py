"""Signals, updates, floors and the power law by themselves."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcli.domain_scheduler import _floors, _signals, _updates
from kdcli.domain_scheduler._power_law import PowerLaw, fit, thinned
from kdcli.errors import ConfigError

shares = st.lists(st.floats(0.01, 1.0), min_size=2, max_size=7).map(
    lambda values: {f"d{i}": value / sum(values) for i, value in enumerate(values)}
)


# ------------------------------------------------------------------------------------------------------- signals


def test_remaining_is_one_at_the_beginning_and_zero_at_the_target() -> None:
    began, target = {"a": 4.0, "b": 3.0, "c": 2.0}, {"a": 2.0, "b": 2.0, "c": 2.5}
    assert _signals.remaining(began, began, target) == {"a": 1.0, "b": 1.0, "c": 0.0}  # c began below its target
    assert _signals.remaining({"a": 2.0, "b": 2.25, "c": 9.0}, began, target) == {"a": 0.0, "b": 0.25, "c": 0.0}


def test_excess_loss_is_clipped_and_a_gap_is_not() -> None:
    losses, reference = {"a": 2.0, "b": 1.0}, {"a": 1.5, "b": 1.5}
    assert _signals.loss_gap(losses, reference) == {"a": 0.5, "b": -0.5}
    assert _signals.loss_gap(losses, reference, clip=True) == {"a": 0.5, "b": 0.0}


def test_descent_is_the_mean_relative_fall() -> None:
    """8 -> 4 -> 3: falls of 1/2 and 1/4, mean 3/8. 1 -> 2 -> 2 rises. Below `least` 0.1, least divides."""
    history = [{"a": 8.0, "b": 1.0, "c": 0.1}, {"a": 4.0, "b": 2.0, "c": 0.05}, {"a": 3.0, "b": 2.0, "c": 0.0}]
    assert _signals.descent(history, 0.1) == {"a": pytest.approx(0.375), "b": 0.0, "c": pytest.approx(0.5)}
    assert _signals.descent(history[:1], 0.1) == {"a": 0.0, "b": 0.0, "c": 0.0}


def test_a_moving_average_begins_with_the_first_value() -> None:
    assert _signals.ema(None, {"a": 2.0}, 0.9) == {"a": pytest.approx(2.0)}
    assert _signals.ema({"a": 2.0}, {"a": 4.0}, 0.75) == {"a": pytest.approx(2.5)}


# ------------------------------------------------------------------------------------------------------- updates


@pytest.mark.parametrize(
    ("update", "epsilon"), [(0, 1 / 3), (1, 0.33333), (10, 0.19136), (100, 0.06051), (1000, 0.01914)]
)
def test_exploration_of_three_arms(update: int, epsilon: float) -> None:
    assert _updates.exploration(update, 3) == pytest.approx(epsilon, abs=5e-6)


@given(weights=shares, radius=st.floats(0.001, 0.2), data=st.data())
def test_chi2_dro_is_the_worst_mixture_of_its_ball(
    weights: dict[str, float], radius: float, data: st.DataObject
) -> None:
    """It is in the ball, and no mixture of the ball, drawn at random, has a larger mean signal."""
    signal = {name: data.draw(st.floats(-3, 3)) for name in weights}

    def divergence(q: dict[str, float]) -> float:
        return 0.5 * sum((q[name] / p - 1) ** 2 * p for name, p in weights.items())

    def mean(q: dict[str, float]) -> float:
        return sum(q[name] * signal[name] for name in q)

    q = _updates.chi2_dro(weights, signal, radius)
    assert sum(q.values()) == pytest.approx(1.0)
    assert divergence(q) <= radius * (1 + 1e-6) + 1e-9
    assert mean(q) >= mean(weights) - 1e-9
    other = _updates.normalized({name: data.draw(st.floats(0.0, 1.0)) for name in weights})
    for share in (1.0, 0.5, 0.1):
        near = {name: share * other[name] + (1 - share) * p for name, p in weights.items()}
        if divergence(near) <= radius:
            assert mean(near) <= mean(q) + 1e-6


def test_chi2_dro_is_on_the_edge_of_its_ball_where_it_can_be() -> None:
    """Two domains at 1/2: q = 1/2 +- d has divergence 2 d^2, so radius 0.02 means d = 0.1, for signals of any size."""
    for signal in ({"a": 1.0, "b": 0.0}, {"a": 5e8, "b": -5e8}, {"a": -3.0, "b": -3.001}, {"a": 1e308, "b": -1e308}):
        assert _updates.chi2_dro({"a": 0.5, "b": 0.5}, signal, 0.02) == pytest.approx({"a": 0.6, "b": 0.4}, abs=1e-6)


def test_chi2_dro_stays_without_a_signal_and_stops_at_its_edge() -> None:
    assert _updates.chi2_dro({"a": 0.7, "b": 0.3}, {"a": 2.0, "b": 2.0}, 0.1) == {"a": 0.7, "b": 0.3}
    assert _updates.chi2_dro({"a": 0.5, "b": 0.5}, {"a": 1.0, "b": 0.0}, 99.0) == pytest.approx({"a": 1.0, "b": 0.0})
    held = _updates.chi2_dro({"a": 0.5, "b": 0.5}, {"a": 1.0, "b": 0.0}, 99.0, least=0.2)
    assert held == pytest.approx({"a": 1 / 1.1, "b": 0.1 / 1.1})  # (1, 0.2 x 0.5) normalized


@given(weights=shares, signal=st.floats(-1e300, 1e300))
def test_multiplying_all_alike_changes_nothing(weights: dict[str, float], signal: float) -> None:
    assert _updates.multiplicative(weights, dict.fromkeys(weights, signal if abs(signal) < 1e12 else 0.0)) == (
        pytest.approx(weights, abs=1e-3)
    )
    extreme = _updates.multiplicative(weights, dict.fromkeys(weights, signal))
    assert math.fsum(extreme.values()) == pytest.approx(1.0)


def test_a_weight_of_zero_can_come_back() -> None:
    assert _updates.multiplicative({"a": 1.0, "b": 0.0}, {"a": 0.0, "b": 800.0})["b"] > 0.99


def test_a_running_average_is_the_mean() -> None:
    mean = {"a": 1.0, "b": 0.0}
    for count, new in enumerate([0.5, 0.3, 0.2], start=2):
        mean = _updates.average(mean, {"a": new, "b": 1 - new}, count)
    assert mean == pytest.approx({"a": 0.5, "b": 0.5})


def test_normalized_takes_any_size() -> None:
    assert _updates.normalized({"a": 1e308, "b": 1e308}) == {"a": 0.5, "b": 0.5}
    assert _updates.normalized({"a": 0.0, "b": 0.0}) == {"a": 0.5, "b": 0.5}


# -------------------------------------------------------------------------------------------------------- floors


@given(weights=shares, share=st.floats(0, 1))
def test_mixing_keeps_sum_order_and_floor(weights: dict[str, float], share: float) -> None:
    mixed = _floors.mix(weights, share)
    assert math.fsum(mixed.values()) == pytest.approx(1.0)
    assert min(mixed.values()) >= share / len(weights) - 1e-15
    ranked = sorted(weights, key=lambda name: weights[name])
    assert all(mixed[low] <= mixed[high] + 1e-15 for low, high in pairwise(ranked))


@given(weights=shares, share=st.floats(0, 1))
def test_a_least_probability_is_held_at_the_cost_of_the_others(weights: dict[str, float], share: float) -> None:
    least = share / len(weights)
    held = _floors.min_probability(weights, least)
    assert math.fsum(held.values()) == pytest.approx(1.0)
    assert min(held.values()) >= least - 1e-12
    free = [name for name in weights if held[name] > least * (1 + 1e-9)]
    for name in free:  # those that are not raised keep their ratios
        assert held[name] * weights[free[0]] == pytest.approx(held[free[0]] * weights[name])


def test_a_floor_that_is_more_than_there_is_names_its_setting() -> None:
    with pytest.raises(ConfigError, match=r"least is 0.3, and 4 domains cannot have that much each; give at most 0.25"):
        _floors.fitting(0.3, 4, "least")


# ----------------------------------------------------------------------------------------------------- power law


@pytest.mark.parametrize("law", [PowerLaw(2.0, 5.0, 0.3), PowerLaw(0.0, 8.0, 0.1), PowerLaw(1.5, 300.0, 0.9)])
def test_a_law_is_found_again(law: PowerLaw) -> None:
    found = fit([[float(n), law(n), 1.0] for n in range(10, 2000, 20)])
    assert found.exponent == pytest.approx(law.exponent, abs=2e-3)
    assert found(20_000) == pytest.approx(law(20_000), rel=2e-3)
    assert found.speed(1000) == pytest.approx((law(999.5) - law(1000.5)), rel=1e-2)


def test_a_loss_that_rises_has_no_speed() -> None:
    found = fit([[float(n), 2.0 + n / 100, 1.0] for n in range(1, 50)])
    assert found.scale == 0.0
    assert found.speed(50) == 0.0


def test_points_are_thinned_without_losing_any() -> None:
    points = [[float(n), 3.0 + n, 1.0] for n in range(1, 259)]
    short = thinned(points)
    assert len(short) == 129
    assert sum(point[2] for point in short) == 258
    assert sum(p[0] * p[2] for p in short) == pytest.approx(sum(p[0] for p in points))
    assert short[0] == [1.5, 4.5, 2.0]
