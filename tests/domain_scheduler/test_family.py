"""What holds for every domain scheduler, through its YAML file."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace
from typing import Any

import pytest

from kdcli.api import DomainLoss
from kdcli.errors import ConfigError
from tests.domain_scheduler.options import CASES, OPTIONS, SIZES, SOON, follow, node, probe, run, scheduler

MEASURED = {field.name for field in fields(DomainLoss)}
ADAPTIVE = [case for case in CASES if scheduler(case[0], **case[1]).signals]
PROBED = [case for case in ADAPTIVE if scheduler(case[0], **case[1]).signals - {"trained", "tokens"}]
PROBES = [probe(seed) for seed in range(14)]


def ids(case: tuple[str, dict[str, Any]]) -> str:
    return "-".join([case[0], *(f"{key}={value}" for key, value in case[1].items())])


def case_of(cases: list[tuple[str, dict[str, Any]]]) -> Any:
    return pytest.mark.parametrize("case", cases, ids=ids)


@case_of(CASES)
def test_weights_are_shares(case: tuple[str, dict[str, Any]]) -> None:
    for weights in run(scheduler(case[0], **case[1]), PROBES):
        assert list(weights) == list(SIZES)
        assert math.fsum(weights.values()) == pytest.approx(1.0, abs=1e-12)
        assert all(0 <= weight <= 1 for weight in weights.values())


@case_of(ADAPTIVE)
def test_an_adaptive_scheduler_moves_weights_and_says_what_it_reads(case: tuple[str, dict[str, Any]]) -> None:
    one = scheduler(case[0], **case[1])
    weights = run(one, PROBES)
    assert one.signals <= MEASURED
    assert one.interval > 0
    assert weights[-1] != weights[0]


@pytest.mark.parametrize("name", OPTIONS)
def test_a_scheduler_without_signals_does_not_look_at_losses(name: str) -> None:
    one = scheduler(name)
    if not one.signals:
        assert run(one, [{}, {}, {}]) == run(scheduler(name), PROBES[:3])


@case_of(CASES)
def test_the_order_of_domains_permutes_weights_and_nothing_else(case: tuple[str, dict[str, Any]]) -> None:
    names = ["web", "code", "prose", "law"]
    plain = run(scheduler(case[0], **case[1]), PROBES)
    turned = run(
        scheduler(case[0], **case[1]),
        [{name: found[name] for name in names} for found in PROBES],
        {name: SIZES[name] for name in names},
    )
    assert plain == turned  # dictionaries are equal whatever their order
    assert list(turned[-1]) == names


@case_of(CASES)
def test_the_same_probes_give_the_same_weights(case: tuple[str, dict[str, Any]]) -> None:
    assert run(scheduler(case[0], **case[1]), PROBES) == run(scheduler(case[0], **case[1]), PROBES)


@case_of(CASES)
@pytest.mark.parametrize("cut", [1, 3, 12])
def test_a_restored_scheduler_goes_on_exactly(case: tuple[str, dict[str, Any]], cut: int) -> None:
    """Its state survives JSON, which is what a checkpoint is written in."""
    whole, began = scheduler(case[0], **case[1]), scheduler(case[0], **case[1])
    expected = run(whole, PROBES)
    before = run(began, PROBES[:cut])
    state = json.loads(json.dumps(began.state_dict(), allow_nan=False))
    resumed = scheduler(case[0], **case[1])
    resumed.initial(SIZES)
    resumed.load_state_dict(state)
    assert before + follow(resumed, PROBES[cut:], before[-1]) == expected
    assert resumed.state_dict() == whole.state_dict()


@case_of(CASES)
def test_a_state_is_a_copy(case: tuple[str, dict[str, Any]]) -> None:
    one = scheduler(case[0], **case[1])
    run(one, PROBES[:2])
    state = one.state_dict()
    before = json.dumps(state)
    one.update(SIZES, PROBES[3])
    assert json.dumps(state) == before


@case_of(CASES)
def test_one_domain_alone_has_weight_one(case: tuple[str, dict[str, Any]]) -> None:
    changes = dict(case[1])
    if case[0] == "static":
        changes["weights"] = {"only": 3}
    if case[0] == "curriculum":
        changes["stages"] = [{"steps": 2, "domains": ["only"]}, {"domains": ["only"]}]
    probes = [probe(seed, {"only": 1}) for seed in range(8)]
    for weights in run(scheduler(case[0], **changes), probes, {"only": 5}):
        assert weights == {"only": pytest.approx(1.0, abs=1e-12)}


@case_of([case for case in CASES if case[0] not in ("static", "curriculum")])
def test_a_domain_without_rows_has_no_weight_and_changes_nothing(case: tuple[str, dict[str, Any]]) -> None:
    sizes = {**SIZES, "empty": 0}
    plain, with_empty = run(scheduler(case[0], **case[1]), PROBES), run(scheduler(case[0], **case[1]), PROBES, sizes)
    assert with_empty == [{**weights, "empty": 0.0} for weights in plain]


@case_of(ADAPTIVE)
@pytest.mark.parametrize("scale", [1e4, 1e-9, 1e120])
def test_extreme_losses_leave_weights_finite(case: tuple[str, dict[str, Any]], scale: float) -> None:
    """A ratio of perplexities of 1e4 is a gap of 9.2 nats; here gaps are up to 1e120."""
    one = scheduler(case[0], **case[1])
    for weights in run(one, [probe(seed, scale=scale) for seed in range(14)]):
        assert all(map(math.isfinite, weights.values()))
        assert math.fsum(weights.values()) == pytest.approx(1.0, abs=1e-9)
    json.dumps(one.state_dict(), allow_nan=False)


@case_of(ADAPTIVE)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_domain_whose_number_is_not_finite_keeps_its_last_one(case: tuple[str, dict[str, Any]], value: float) -> None:
    broken, held = scheduler(case[0], **case[1]), scheduler(case[0], **case[1])
    start = run(broken, PROBES[:6])[-1]
    run(held, PROBES[:6])
    now, before = PROBES[6], PROBES[5]["law"]
    read = {name: getattr(before, name) for name in broken.signals - {"trained", "tokens"}}
    if not read:  # training numbers are read as of a domain that was not drawn
        read = {"trained": None, "tokens": None}
    bad = {**now, "law": replace(now["law"], **dict.fromkeys(read, value))}
    good = {**now, "law": replace(now["law"], **read)}
    assert broken.update(start, bad) == held.update(start, good)


@case_of(PROBED)
def test_the_first_probe_must_be_finite_in_every_domain(case: tuple[str, dict[str, Any]]) -> None:
    for field in scheduler(case[0], **case[1]).signals - {"trained", "tokens"}:
        one = scheduler(case[0], **case[1])  # anew, because it remembers what it has read
        weights = one.initial(SIZES)
        bad = {**PROBES[0], "prose": replace(PROBES[0]["prose"], **{field: math.nan})}
        with pytest.raises(ConfigError, match=rf"{field} of domain prose is nan at its first probe; look at"):
            one.first(weights, bad)


@case_of(PROBED)
def test_a_domain_without_held_out_rows_is_an_error(case: tuple[str, dict[str, Any]]) -> None:
    one = scheduler(case[0], **case[1])
    weights = one.initial(SIZES)
    few = {name: loss for name, loss in PROBES[0].items() if name != "law"}
    with pytest.raises(ConfigError, match=r"domain law has no held-out rows; add some or lower probe\.rows"):
        one.first(weights, few)


@case_of([case for case in PROBED if {"teacher", "kl"} & scheduler(case[0], **case[1]).signals])
def test_a_teacher_that_nobody_has_is_an_error_with_the_way_out(case: tuple[str, dict[str, Any]]) -> None:
    one = scheduler(case[0], **case[1])
    weights = one.initial(SIZES)
    alone = {name: replace(loss, teacher=None, kl=None) for name, loss in PROBES[0].items()}
    with pytest.raises(ConfigError, match=r"nobody knows the teacher's .* on domain code; set teacher=hf"):
        one.first(weights, alone)


@pytest.mark.parametrize("case", ADAPTIVE, ids=ids)
def test_the_average_is_of_the_weights_after_updates(case: tuple[str, dict[str, Any]]) -> None:
    one = scheduler(case[0], **case[1])
    weights = one.initial(SIZES)
    assert one.averages() == weights
    updates = run(one, PROBES)[-one.updates :]
    for name, share in one.averages().items():
        assert share == pytest.approx(math.fsum(w[name] for w in updates) / len(updates), abs=1e-12)


FLOORS = {"ddk": 0.125, "doremi": 0.001 / 4, "sheared": 1e-4 / 4, "velocitune": 1e-4 / 4, "gap": 0.1, "composed": 0.125}


@pytest.mark.parametrize(("name", "least"), FLOORS.items())
@pytest.mark.parametrize("scale", [1.0, 50.0])
def test_no_domain_falls_below_the_floor(name: str, least: float, scale: float) -> None:
    lowest = 1.0
    for weights in run(scheduler(name, **SOON.get(name, {})), [probe(seed, scale=scale) for seed in range(30)])[2:]:
        lowest = min(lowest, *weights.values())
        assert lowest >= least - 1e-15
    if scale > 1 and name != "gap":  # gap's signal is over its largest, so its softmax never gets that far
        assert lowest == pytest.approx(least, rel=0.2)


@pytest.mark.parametrize("name", [name for name in OPTIONS if "actuator" in node(name)])
def test_actuator_quota_and_interval_are_settings(name: str) -> None:
    for actuator in ("resample", "reweight"):
        for quota in ("iid", "hamilton"):
            one = scheduler(name, actuator=actuator, quota=quota, interval=7)
            assert (one.actuator, one.quota, one.interval) == (actuator, quota, 7)


@pytest.mark.parametrize("name", OPTIONS)
def test_the_first_interval_is_drawn_as_asked(name: str) -> None:
    if "first_interval" not in node(name):
        return
    natural = {name: size / sum(SIZES.values()) for name, size in SIZES.items()}
    assert scheduler(name, first_interval="natural").initial(SIZES) == pytest.approx(natural)
    assert scheduler(name, first_interval="uniform").initial(SIZES) == dict.fromkeys(SIZES, 0.25)


@pytest.mark.parametrize("name", [name for name in OPTIONS if "interval" in node(name)])
def test_a_negative_interval_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="interval is -1"):
        scheduler(name, interval=-1)
