"""Schedules of objectives' numbers: their formulas, their state, and what they are told."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcli.errors import ConfigError
from kdcli.objective.forward_kl import ForwardKL
from kdcli.train.schedule import KINDS, TAID, Progress, Schedule, is_schedule, schedule_of, start_values
from kdcli.train.scheduling import Schedules

EXAMPLES: dict[str, dict[str, Any]] = {
    "constant": {"value": 2},
    "linear": {"start": 4, "end": 1, "begin": 0.2, "until": 0.7},
    "cosine": {"start": 0.1, "end": 0.7, "until": 0.9},
    "epochs": {"values": [3, 1, 2]},
    "taid": {"start": 0.1, "end": 0.9, "alpha": 0.3, "momentum": 0.9},
}
every_kind = pytest.mark.parametrize("kind", KINDS)
numbers = st.floats(-1e6, 1e6)
shares = st.integers(0, 1000).map(lambda step: Progress(step=step, steps=1000))


def make(kind: str, **changes: Any) -> Schedule:
    return schedule_of({"schedule": kind, **EXAMPLES[kind], **changes})


def course(schedule: Schedule, losses: list[float], steps: int | None = None) -> list[float]:
    """The value of each optimizer step of a run with these losses."""
    values = []
    steps = steps or len(losses)
    for done, loss in enumerate(losses):
        values.append(schedule.value(Progress(done, steps, epoch=done // 4)))
        schedule.after_step(loss, Progress(done + 1, steps, epoch=(done + 1) // 4))
    return values


# ------------------------------------------------------------------------------------------------------- each formula


def test_linear_goes_straight_between_its_shares() -> None:
    """4 to 1 while the share goes from .2 to .7: at .45 the middle, 2.5; at .3 a fifth of the way, 3.4."""
    values = [make("linear").value(Progress(step, 100)) for step in (0, 20, 30, 45, 70, 99)]
    assert values == pytest.approx([4, 4, 3.4, 2.5, 1, 1])


def test_linear_begins_at_its_start_and_is_a_step_short_of_its_end() -> None:
    """Like a learning rate: three steps see the shares 0, 1/3 and 2/3."""
    assert course(make("linear", begin=0, until=1), [1.0] * 3) == [4.0, 3.0, 2.0]


def test_cosine_is_half_a_wave() -> None:
    """At a quarter of the way end + (start - end) (1 + cos(pi / 4)) / 2 = .8535… for 1 to 0; in the middle one half."""
    schedule = make("cosine", start=1, end=0, until=1)
    values = [schedule.value(Progress(step, 4)) for step in range(5)]
    assert values == pytest.approx([1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2, 0])


@given(start=numbers, end=numbers, kind=st.sampled_from(["linear", "cosine"]))
def test_both_ends_are_exact(start: float, end: float, kind: str) -> None:
    schedule = make(kind, start=start, end=end, begin=0.0, until=0.5)
    assert schedule.value(Progress(0, 8)) == start
    assert [schedule.value(Progress(step, 8)) for step in (4, 5, 8, 9)] == [end] * 4


def test_epochs_have_their_values_and_the_last_one_afterwards() -> None:
    assert [make("epochs").value(Progress(0, 1, epoch=epoch)) for epoch in range(5)] == [3, 1, 2, 2, 2]


def test_a_constant_is_constant() -> None:
    assert course(make("constant"), [3.0, 2.0, 1.0]) == [2.0] * 3


def test_taid_by_hand() -> None:
    """start .1, end .9, alpha .3, momentum .9, 10 steps; losses 2, 1, 1.5:

    after step 1 only the loss is kept: t = .1
    after step 2: change .5, m = .05, delta = .3 x sigmoid(.05) x .9 = .138374; the line is at .26, so t = .26
    after step 3: change -.5, m = -.005, delta = .3 x sigmoid(-.005) x .74 = .110723; the line is at .34, t = .370723
    """
    schedule = make("taid")
    assert course(schedule, [2.0, 1.0, 1.5, 1.5], steps=10) == pytest.approx([0.1, 0.1, 0.26, 0.3707225], abs=1e-7)


@given(losses=st.lists(st.floats(0, 100), min_size=2, max_size=30), alpha=st.floats(0, 1))
def test_taid_never_falls_never_lags_the_line_and_ends_at_its_end(losses: list[float], alpha: float) -> None:
    schedule = make("taid", alpha=alpha)
    assert isinstance(schedule, TAID)
    values = [*course(schedule, losses), schedule.t]
    assert all(a <= b for a, b in itertools.pairwise(values))
    assert all(0.1 <= value <= 0.9 for value in values)
    # the second step of a run still sees the start: its loss is the first to compare with
    assert all(value >= 0.1 + 0.8 * done / len(losses) - 1e-12 for done, value in enumerate(values) if done != 1)
    assert values[-1] == pytest.approx(0.9)


def test_taid_hurries_while_the_loss_falls_and_dawdles_while_it_rises() -> None:
    still, falling, rising = (
        course(make("taid", momentum=0.0), [4.0 * factor**step for step in range(6)], steps=1000)[-1]
        for factor in (1.0, 0.5, 2.0)
    )
    assert rising < still < falling


def test_taid_survives_a_loss_that_explodes_or_vanishes() -> None:
    for losses in ([1e-30, 1e30, 1.0, 1.0], [1.0, 0.0, 1.0, 1.0], [0.0] * 4):
        assert all(map(math.isfinite, course(make("taid"), losses)))


# -------------------------------------------------------------------------------------------------- what all must hold


def test_every_kind_has_an_example_here() -> None:
    assert EXAMPLES.keys() == KINDS.keys()


@every_kind
@given(losses=st.lists(st.floats(0, 10), min_size=1, max_size=12))
def test_values_lie_between_the_extremes(kind: str, losses: list[float]) -> None:
    schedule = make(kind)
    low, high = min(schedule.extremes), max(schedule.extremes)
    assert all(low <= value <= high for value in course(schedule, losses))


@every_kind
def test_the_first_value_is_the_one_that_objectives_are_built_with(kind: str) -> None:
    node = {"_target_": "X", "weight": {"schedule": kind, **EXAMPLES[kind]}, "other": 3}
    first = make(kind).value(Progress(0, 100))
    assert start_values(node) == {"_target_": "X", "weight": first, "other": 3}
    assert first in make(kind).extremes


@every_kind
@given(losses=st.lists(st.floats(0, 10), min_size=2, max_size=12), data=st.data())
def test_a_state_put_back_goes_on_the_same(kind: str, losses: list[float], data: st.DataObject) -> None:
    """Through JSON, as checkpoints do."""
    stop = data.draw(st.integers(0, len(losses)))
    steps = len(losses)
    whole, first, second = make(kind), make(kind), make(kind)
    expected = course(whole, losses)
    begun = course(first, losses[:stop], steps)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    rest = []
    for done in range(stop, steps):
        rest.append(second.value(Progress(done, steps, epoch=done // 4)))
        second.after_step(losses[done], Progress(done + 1, steps, epoch=(done + 1) // 4))
    assert begun + rest == expected
    assert second.state_dict() == whole.state_dict()


@every_kind
def test_values_that_depend_on_the_length_of_the_run_are_of_kinds_that_say_so(kind: str) -> None:
    """Unless a kind says `spread`, a run that is made longer goes on as if it had been so from the beginning."""
    losses = [1 / (1 + step) for step in range(8)]
    same = course(make(kind), losses, steps=8) == course(make(kind), losses, steps=16)
    assert same != make(kind).spread


@pytest.mark.parametrize(
    ("node", "says"),
    [
        ({"schedule": "linar"}, "there is no schedule linar; there is constant, linear, cosine, epochs, taid"),
        ({"schedule": ["linear"]}, "there is no schedule"),
        ({"schedule": "linear", "start": 1}, "cannot be made of"),
        ({"schedule": "linear", "start": 1, "end": "x"}, "cannot be made of"),
        ({"schedule": "linear", "start": 1, "end": math.inf}, "end is inf; set a finite number"),
        ({"schedule": "cosine", "start": math.nan, "end": 1}, "start is nan"),
        ({"schedule": "constant", "value": -math.inf}, "value is -inf"),
        ({"schedule": "linear", "start": 1, "end": 2, "begin": 0.5, "until": 0.5}, "0 <= begin < until <= 1"),
        ({"schedule": "linear", "start": 1, "end": 2, "begin": -0.1}, "0 <= begin"),
        ({"schedule": "linear", "start": 1, "end": 2, "until": 1.5}, "until <= 1"),
        ({"schedule": "epochs", "values": []}, "values is empty"),
        ({"schedule": "taid", "start": 0.6, "end": 0.5}, "0 <= start <= end <= 1"),
        ({"schedule": "taid", "end": 1.5}, "0 <= start <= end <= 1"),
        ({"schedule": "taid", "alpha": -1}, "alpha is -1"),
        ({"schedule": "taid", "momentum": 1}, "momentum is 1"),
    ],
)
def test_what_no_schedule_can_do_is_refused(node: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as error:
        schedule_of(node)
    assert says in str(error.value)


def test_only_a_mapping_that_names_its_schedule_is_one() -> None:
    assert is_schedule({"schedule": "linear"})
    assert not any(map(is_schedule, (1.0, "schedule", ["schedule"], {"start": 1}, None)))


# ------------------------------------------------------------------------------------------------------------ at work


def test_numbers_are_set_before_a_step_and_named_in_its_metrics() -> None:
    kd, ce = ForwardKL(temperature=4), ForwardKL()
    schedules = Schedules(
        {("kd", "temperature"): make("linear", begin=0, until=1), ("ce", "weight"): make("epochs")},
        {"kd": kd, "ce": ce},
        steps=3,
        epoch=lambda done: done // 2,
    )
    seen = [(schedules.apply(step), kd.temperature, ce.weight) for step in (1, 2, 3)]
    assert [(temperature, weight) for _, temperature, weight in seen] == [(4.0, 3.0), (3.0, 3.0), (2.0, 1.0)]
    assert seen[2][0] == {"objective/kd/temperature": 2.0, "objective/ce/weight": 1.0}


def test_each_schedule_is_told_of_its_own_term() -> None:
    one, other = make("taid"), make("taid")
    schedules = Schedules(
        {("a", "weight"): one, ("b", "weight"): other}, {"a": ForwardKL(), "b": ForwardKL()}, steps=10
    )
    for step, (a, b) in enumerate([(2.0, 1.0), (1.0, 2.0), (0.5, 4.0)], 1):
        schedules.observe(step, {"loss/a": a, "loss/b": b, "loss/total": a + b}, {"a": 5.0, "b": 5.0, "tokens": 5.0})
    alone = make("taid")
    course(alone, [2.0, 1.0, 0.5], steps=10)
    assert one.state_dict() == alone.state_dict()
    assert other.state_dict() != alone.state_dict()


def test_a_step_without_a_unit_of_the_term_tells_nothing() -> None:
    """A term of one domain: in a step that drew none of it the loss is 0, but nothing was learned."""
    schedule, alone = make("taid"), make("taid")
    schedules = Schedules({("kd", "weight"): schedule}, {"kd": ForwardKL()}, steps=10)
    for step, (loss, count) in enumerate([(2.0, 4.0), (0.0, 0.0), (1.0, 4.0)], 1):
        schedules.observe(step, {"loss/kd": loss}, {"kd": count})
    alone.after_step(2.0, Progress(1, 10))
    alone.after_step(1.0, Progress(3, 10))
    assert schedule.state_dict() == alone.state_dict()


def test_a_state_of_other_schedules_is_refused() -> None:
    old = Schedules({("kd", "weight"): make("taid")}, {"kd": ForwardKL()})
    new = Schedules({("kd", "temperature"): make("taid")}, {"kd": ForwardKL()})
    with pytest.raises(ConfigError, match=r"saved with the schedules kd\.weight, but there are kd\.temperature"):
        new.load_state_dict(old.state_dict())
    with pytest.raises(ConfigError, match="but there are none"):
        Schedules().load_state_dict(old.state_dict())
