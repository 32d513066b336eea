"""DDK against the numbers and properties of arXiv:2407.16154, eq. 1, eq. 2, Algorithm 1."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcli.api import DomainLoss
from kdcli.domain_scheduler.ddk import DDK
from kdcli.domain_scheduler.doremi import DoReMi
from kdcli.errors import ConfigError
from tests.domain_scheduler.options import losses, scheduler

NAMES = ["a", "b", "c"]
TEACHER = [8.0, 5.0, 10.0]  # perplexities
STUDENT = [[12.0, 6.0, 20.0], [11.0, 5.8, 17.0], [10.0, 5.6, 14.0]]
EXPECTED = [[0.295025, 0.218560, 0.486415], [0.295553, 0.243676, 0.460770], [0.308098, 0.269059, 0.422843]]
EQUAL = dict.fromkeys(NAMES, 10)

perplexities = st.lists(st.floats(1.0, 1e6), min_size=3, max_size=3)


def measured(student: list[float], teacher: list[float]) -> dict[str, DomainLoss]:
    """Perplexities to what a probe gives."""
    return losses(*({n: math.log(p) for n, p in zip(NAMES, ppl, strict=True)} for ppl in (student, teacher)))


def plain(r: Mapping[str, float], student: list[float], teacher: list[float], alpha: float) -> dict[str, float]:
    """Eq. 2 as it is written, not in log space."""
    psi = [p * math.exp(s / t) for p, s, t in zip(r.values(), student, teacher, strict=True)]
    return {n: alpha * one / sum(psi) + (1 - alpha) / len(r) for n, one in zip(r, psi, strict=True)}


def test_the_golden_vectors_of_three_probes() -> None:
    """l_T = [8, 5, 10]: r_0 = softmax([12/8, 6/5, 20/10]) is the first; the others by eq. 2 with alpha 0.5."""
    one = DDK(first_interval="r0")
    weights = one.initial(EQUAL)
    weights = one.first(weights, measured(STUDENT[0], TEACHER))
    said = [weights]
    for student in STUDENT[1:]:
        said.append(one.update(said[-1], measured(student, TEACHER)))
    for found, expected in zip(said, EXPECTED, strict=True):
        assert list(found.values()) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("first_interval", ["natural", "r0", "uniform"])
def test_the_first_interval_changes_what_is_drawn_and_not_the_history(first_interval: str) -> None:
    """Algorithm 1 draws D_0 at random and uses r_0 in eq. 2 all the same."""
    one = scheduler("ddk", first_interval=first_interval)
    initial = one.initial({"a": 60, "b": 30, "c": 10})
    first = one.first(initial, measured(STUDENT[0], TEACHER))
    if first_interval == "natural":
        assert list(first.values()) == [0.6, 0.3, 0.1]
    elif first_interval == "uniform":
        assert list(first.values()) == [1 / 3] * 3
    else:
        assert list(first.values()) == pytest.approx(EXPECTED[0], abs=1e-6)
    # the weights handed in are the loader's; eq. 2 goes by r_0
    found = one.update({"a": 0.0, "b": 0.0, "c": 1.0}, measured(STUDENT[1], TEACHER))
    assert list(found.values()) == pytest.approx(EXPECTED[1], abs=1e-6)


def test_the_papers_defaults() -> None:
    one = scheduler("ddk")
    assert (one.smoothing, one.interval, one.first_interval, one.quota) == (0.5, 1000, "natural", "iid")
    assert (one.actuator, one.signals) == ("resample", {"student", "teacher"})


@given(student=st.lists(perplexities, min_size=1, max_size=6), teacher=perplexities, alpha=st.floats(0.01, 0.99))
def test_weights_lie_within_the_bounds_of_eq_2(student: list[list[float]], teacher: list[float], alpha: float) -> None:
    one = DDK(smoothing=alpha)
    one.first(one.initial(EQUAL), measured(student[0], teacher))
    for perplexity in student:
        for weight in one.update({}, measured(perplexity, teacher)).values():
            assert (1 - alpha) / 3 - 1e-12 <= weight <= alpha + (1 - alpha) / 3 + 1e-12


@given(
    student=st.lists(st.floats(1.0, 60.0), min_size=3, max_size=3),
    teacher=st.lists(st.floats(1.0, 60.0), min_size=3, max_size=3),
    alpha=st.floats(0.0, 1.0),
)
def test_log_space_gives_what_eq_2_gives_where_that_is_finite(
    student: list[float], teacher: list[float], alpha: float
) -> None:
    one = DDK(smoothing=alpha)
    one.first(one.initial(EQUAL), measured(STUDENT[0], TEACHER))
    r = dict(one.weights)
    assert one.update({}, measured(student, teacher)) == pytest.approx(plain(r, student, teacher, alpha), abs=1e-9)


@pytest.mark.parametrize("ratio", [88.0, 1e3, 1e4, 1e300])
def test_a_ratio_beyond_exp_gives_the_cap_of_eq_2(ratio: float) -> None:
    """exp(ratio) is not a float64 above 709; the outlier has alpha + (1 - alpha) / N, the others the floor."""
    one = DDK()
    one.first(one.initial(EQUAL), measured([ratio, 1.0, 1.0], [1.0, 1.0, 1.0]))
    weights = one.update({}, measured([ratio, 1.0, 1.0], [1.0, 1.0, 1.0]))
    assert list(weights.values()) == pytest.approx([0.5 + 0.5 / 3, 0.5 / 3, 0.5 / 3], abs=1e-12)
    recovered = one.update({}, measured([1.0, 1.0, 3.0], [1.0, 1.0, 1.0]))
    assert recovered["c"] > recovered["b"]


def test_a_perplexity_that_is_no_float_still_has_a_ratio() -> None:
    """Losses of 2000 and 1999 nats: perplexities overflow, their ratio is e."""
    one = DDK(smoothing=1.0)
    found = losses({"a": 2000.0, "b": 1.0, "c": 1.0}, {"a": 1999.0, "b": 1.0, "c": 1.0})
    one.first(one.initial(EQUAL), found)
    assert one.weights["a"] == pytest.approx(math.exp(math.e) / (math.exp(math.e) + 2 * math.exp(1)), abs=1e-12)


@pytest.mark.parametrize("alpha", [0.5, 0.9])
def test_it_is_doremis_update_with_another_signal(alpha: float) -> None:
    """DoReMi with step size 1 and c = 1 - alpha, given the perplexity ratio as excess loss: not a bit differs."""
    ddk, doremi = DDK(smoothing=alpha), DoReMi(reference=dict.fromkeys(NAMES, 0.0), step_size=1.0, floor=1 - alpha)
    doremi.initial(EQUAL)
    ddk.first(ddk.initial(EQUAL), measured(STUDENT[0], TEACHER))
    doremi.weights = dict(ddk.weights)
    for student in STUDENT * 3:
        ratio = {n: math.exp(math.log(s) - math.log(t)) for n, s, t in zip(NAMES, student, TEACHER, strict=True)}
        left = ddk.update({}, measured(student, TEACHER))
        right = doremi.update({}, losses(ratio, trained=ratio))
        assert max(abs(left[name] - right[name]) for name in NAMES) == 0.0


def test_constant_ratios_lead_to_the_fixed_point() -> None:
    """r* = ((1 - alpha) / N) / (1 - alpha e_i / <r*, e>), e = exp(ratio); a ratio of 2.5 among nine of 1.2 begins at
    .290 and ends at .409."""
    ratio = {f"d{i}": 2.5 if i == 0 else 1.2 for i in range(10)}
    found = losses({name: math.log(value) for name, value in ratio.items()}, dict.fromkeys(ratio, 0.0))
    one = DDK()
    one.first(one.initial(dict.fromkeys(ratio, 1)), found)
    assert one.weights["d0"] == pytest.approx(0.290, abs=5e-4)
    for _ in range(60):
        r = one.update({}, found)
    assert r["d0"] == pytest.approx(0.409, abs=5e-4)
    mean = sum(p * math.exp(ratio[name]) for name, p in r.items())
    for name, p in r.items():
        assert p == pytest.approx(0.05 / (1 - 0.5 * math.exp(ratio[name]) / mean), rel=1e-9)


def test_perplexities_are_per_byte_where_tokenizers_differ() -> None:
    """The probe then gives no loss per target of the teacher, and one per byte of both."""
    per_byte = {
        "a": DomainLoss(student=9.0, student_per_byte=1.5, teacher_per_byte=0.5),
        "b": DomainLoss(student=1.0, student_per_byte=1.0, teacher_per_byte=1.0),
        "c": DomainLoss(student=1.0, student_per_byte=0.8, teacher_per_byte=1.0),
    }
    plain_losses = losses({"a": 1.5, "b": 1.0, "c": 0.8}, {"a": 0.5, "b": 1.0, "c": 1.0})
    left, right = DDK(), DDK()
    left.first(left.initial(EQUAL), per_byte)
    right.first(right.initial(EQUAL), plain_losses)
    assert left.weights == right.weights
    assert left.update({}, per_byte) == right.update({}, plain_losses)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, math.nan])
def test_smoothing_is_a_share(alpha: float) -> None:
    with pytest.raises(ConfigError, match="smoothing is"):
        DDK(smoothing=alpha)
