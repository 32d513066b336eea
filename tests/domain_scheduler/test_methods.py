"""What is particular to each method: numbers of its source, or a second formula."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest

from kdcli.api import DomainLoss
from kdcli.domain_scheduler.ado import ADO
from kdcli.domain_scheduler.curriculum import Curriculum
from kdcli.domain_scheduler.doremi import DoReMi
from kdcli.domain_scheduler.gap import Gap
from kdcli.domain_scheduler.odm import ODM
from kdcli.domain_scheduler.sheared import Sheared
from kdcli.domain_scheduler.temperature import Temperature
from kdcli.domain_scheduler.token_share import TokenShare
from kdcli.domain_scheduler.velocitune import Velocitune
from kdcli.errors import ConfigError
from tests.domain_scheduler.options import SIZES, losses, probe, run, scheduler

EQUAL = {"a": 10, "b": 10, "c": 10}


# ------------------------------------------------------------------------------------------------- fixed weights


def test_temperature_goes_from_natural_to_uniform() -> None:
    """sqrt(100) : sqrt(25) = 2 : 1."""
    assert Temperature(temperature=2.0).initial({"a": 100, "b": 25}) == pytest.approx({"a": 2 / 3, "b": 1 / 3})
    assert Temperature(temperature=1.0).initial(SIZES) == pytest.approx(scheduler("natural").initial(SIZES))
    assert Temperature(temperature=1e9).initial(SIZES) == pytest.approx(scheduler("uniform").initial(SIZES))
    with pytest.raises(ConfigError, match=r"temperature is 0\.0; give a number above 0"):
        Temperature(temperature=0.0)


def test_uniform_leaves_out_what_is_empty() -> None:
    assert scheduler("uniform").initial({"a": 3, "b": 0, "c": 1}) == {"a": 0.5, "b": 0.0, "c": 0.5}


# -------------------------------------------------------------------------------------------------------- DoReMi


def test_doremis_golden_vector() -> None:
    """Uniform K = 3, excess [.3, 0, .1], step size 1, c = 1e-3; what is below its reference counts as at it."""
    one = DoReMi(reference={"a": 1.0, "b": 2.0, "c": 3.0})
    one.initial(EQUAL)
    trained = {"a": 1.3, "b": 1.5, "c": 3.1}
    weights = one.update({}, losses(trained, trained=trained))
    assert list(weights.values()) == pytest.approx([0.390636, 0.289477, 0.319887], abs=1e-6)


def test_doremis_defaults_are_the_sample_scripts_and_need_no_probe_with_references() -> None:
    one = scheduler("doremi")
    assert (one.step_size, one.floor, one.interval, one.actuator) == (1.0, 1e-3, 1, "reweight")
    assert one.signals == {"trained", "teacher"}
    assert scheduler("doremi", reference={"a": 1.0}).signals == {"trained"}
    assert scheduler("doremi", losses="heldout").signals == {"student", "teacher"}


def test_a_domain_that_was_not_drawn_keeps_its_score_and_a_new_one_counts_as_the_largest() -> None:
    given = dict.fromkeys(EQUAL, 0.0)
    one, other = DoReMi(reference=given), DoReMi(reference=given)
    for each in (one, other):
        each.initial(EQUAL)
        assert each.update({}, {}) == pytest.approx(dict.fromkeys(EQUAL, 1 / 3))  # nothing is known
    few = losses({"a": 2.0, "b": 1.0}, trained={"a": 2.0, "b": 1.0})
    full = losses({"a": 2.0, "b": 1.0, "c": 2.0}, trained={"a": 2.0, "b": 1.0, "c": 2.0})
    assert one.update({}, few) == other.update({}, full)
    again = losses({"b": 1.0}, trained={"b": 1.0})  # as a loop would say it that only knows what was drawn
    assert one.update({}, again) == other.update({}, full)


def test_doremi_says_so_when_nothing_is_in_excess(caplog: pytest.LogCaptureFixture) -> None:
    one = DoReMi(reference=dict.fromkeys(EQUAL, 9.0))
    one.initial(EQUAL)
    found = losses(dict.fromkeys(EQUAL, 1.0), trained=dict.fromkeys(EQUAL, 1.0))
    with caplog.at_level(logging.WARNING):
        one.update({}, found)
        one.update({}, found)
    assert [record.message for record in caplog.records] == [
        "DoReMi: no domain's trained loss is above its reference, so all weigh alike"
    ]


def test_training_losses_are_not_compared_with_a_teacher_of_other_tokens() -> None:
    one = scheduler("doremi")
    weights = one.initial(EQUAL)
    foreign = {name: DomainLoss(student=1.0, student_per_byte=0.3, teacher_per_byte=0.2) for name in EQUAL}
    with pytest.raises(ConfigError, match="set teacher=hf, with the student's tokenizer"):
        one.first(weights, foreign)


# -------------------------------------------------------------------------------------- schedulers with a reference

SHEARED = ["cc", "github", "book", "stackexchange", "wiki", "arxiv", "c4"]
REFERENCE_1_3B = [1.9643, 0.7459, 2.1393, 1.6117, 1.7590, 1.4449, 2.1251]
REDPAJAMA = [67, 4.5, 4.5, 2, 4.5, 2.5, 15]
LOSSES = [2.10, 0.70, 2.30, 1.70, 1.90, 1.45, 2.40]
AFTER = [0.661793, 0.037081, 0.045587, 0.018854, 0.044698, 0.021684, 0.170302]


def named(values: list[float]) -> dict[str, float]:
    return dict(zip(SHEARED, values, strict=True))


def test_a_step_of_sheared_llama() -> None:
    """Initial RedPajama mix, the 1.3B model's reference losses, eta 1, c 1e-4, no clipping."""
    one = Sheared(reference=named(REFERENCE_1_3B), horizon=48000)
    weights = one.initial({name: int(10 * share) for name, share in named(REDPAJAMA).items()})
    found = losses(named(LOSSES))
    assert one.first(weights, found) == weights
    assert list(one.update(weights, found).values()) == pytest.approx(AFTER, abs=1e-6)
    at_once = Sheared(reference=named(REFERENCE_1_3B), horizon=48000, first_interval="r0")
    weights = at_once.initial({name: int(10 * share) for name, share in named(REDPAJAMA).items()})
    assert list(at_once.first(weights, found).values()) == pytest.approx(AFTER, abs=1e-6)


def test_clipping_spares_a_domain_below_its_reference() -> None:
    clipped = Sheared(reference=named(REFERENCE_1_3B), horizon=48000, clip=True)
    plain = Sheared(reference=named(REFERENCE_1_3B), horizon=48000)
    found = [one.update(one.initial(dict.fromkeys(SHEARED, 1)), losses(named(LOSSES))) for one in (clipped, plain)]
    assert found[0]["github"] > found[1]["github"]  # 0.70 is below 0.7459
    at = named(LOSSES) | {"github": 0.7459}
    expected = plain.update(plain.initial(dict.fromkeys(SHEARED, 1)), losses(at))
    assert found[0] == pytest.approx(expected)


@pytest.mark.parametrize("name", ["sheared", "drpruning", "velocitune"])
def test_references_are_checked_once_domains_are_known(name: str) -> None:
    for given, says in (
        ({"code": 1.0}, r"reference has no number for law, prose, web; give one per domain"),
        (
            {**dict.fromkeys(SIZES, 1.0), "coed": 1.0},
            r"reference\.coed: the data have no such domain; did you mean code",
        ),
        ({**dict.fromkeys(SIZES, 1.0), "law": math.nan}, r"reference\.law is nan; give a finite number"),
    ):
        with pytest.raises(ConfigError, match=says):
            scheduler(name, reference=given).initial(SIZES)


@pytest.mark.parametrize("name", ["sheared", "drpruning", "velocitune"])
def test_only_a_teachers_reference_needs_a_teacher(name: str) -> None:
    for reference in ("fitted", dict.fromkeys(SIZES, 1.0)):
        assert scheduler(name, reference=reference).signals == {"student"}
    assert scheduler(name, reference="teacher").signals == {"student", "teacher"}


def curve(step: int, floor: float, exponent: float) -> float:
    return floor + 4.0 * step**-exponent


def test_a_fitted_reference_predicts_the_end_of_the_run() -> None:
    """Losses on power laws: after eleven updates the reference is the law at `horizon`, here known."""
    laws = {"a": (1.0, 0.5), "b": (2.0, 0.2), "c": (1.5, 0.4)}
    one = Sheared(reference="fitted", horizon=4000, interval=100)
    weights = one.initial(EQUAL)
    for update in range(1, 11):
        found = losses({name: curve(100 * update, *law) for name, law in laws.items()})
        assert one.update(weights, found) == weights  # too few points
    one.update(weights, losses({name: curve(1100, *law) for name, law in laws.items()}))
    for name, law in laws.items():
        assert one.fitted[name] == pytest.approx(curve(4000, *law), abs=5e-3)
    assert one.weights["b"] == max(one.weights.values())  # the slowest has most left to fall
    before = dict(one.fitted)
    one.update(weights, losses(dict.fromkeys(EQUAL, 50.0)))
    assert all(one.fitted[name] <= before[name] for name in EQUAL)  # never rises


def test_velocitune_favours_the_slower_domain_whatever_the_distance() -> None:
    """a has gone half of a long way, b a tenth of a short one: p ~ exp(.5) : exp(.9)."""
    one = Velocitune(reference={"a": 1.0, "b": 1.0}, horizon=100, floor=0.0)
    weights = one.initial({"a": 5, "b": 5})
    one.first(weights, losses({"a": 9.0, "b": 2.0}))
    found = one.update(weights, losses({"a": 5.0, "b": 1.9}))
    assert found["b"] / found["a"] == pytest.approx(math.exp(0.9 - 0.5))


def test_drpruning_spends_its_radius_on_the_domain_furthest_from_its_reference() -> None:
    one = scheduler("drpruning", reference={"a": 1.0, "b": 2.0}, follow=0.0, radius=0.02)
    weights = one.initial({"a": 5, "b": 5})
    assert one.update(weights, losses({"a": 1.5, "b": 2.1})) == pytest.approx({"a": 5 / 9.5, "b": 4.5 / 9.5}, abs=0.09)
    assert one.weights["a"] == pytest.approx(0.6 / (0.6 + 0.5), abs=1e-6)  # (0.6, 0.4), held at 0.5, normalized
    assert one.ratio == {"a": 0.5, "b": 0.5}


def test_drprunings_ratio_follows_after_a_fifth_of_the_run_and_within_a_factor_of_two() -> None:
    one = scheduler("drpruning", reference=dict.fromkeys(SIZES, 1.0), horizon=100, interval=10, follow=0.5, radius=0.5)
    began = one.initial(SIZES)
    found = losses({"code": 1.0, "law": 9.0, "prose": 1.0, "web": 2.0})
    one.update(began, found)
    assert one.ratio == began
    for _ in range(20):
        one.update(began, found)
    assert one.ratio["law"] > 1.5 * began["law"]
    for name, share in one.ratio.items():
        assert began[name] / 2 - 1e-12 <= share <= 2 * began[name] + 1e-12
        assert min(began.values()) - 1e-12 <= share <= max(began.values()) + 1e-12


# ----------------------------------------------------------------------------------------------------- DoGE, ODM


def test_doge_clips_alignment_and_scales_it_by_lr_over_mu() -> None:
    """lr / mu = 0.05: p ~ exp(0.05 x [0, 2, 5])."""
    one = scheduler("doge")
    weights = one.initial(EQUAL)
    found = one.update(weights, losses(dict.fromkeys(EQUAL, 1.0), alignment={"a": -3.0, "b": 2.0, "c": 80.0}))
    raw = [1.0, math.exp(0.1), math.exp(0.25)]
    assert list(found.values()) == pytest.approx([value / sum(raw) for value in raw])


def test_odm_is_the_authors_exp3() -> None:
    """data_sampling_utils.py, written again for dictionaries: rewards of the drawn domains over their probability."""
    one = ODM(warmup=2)
    p = one.initial(SIZES)
    count, cumulative, epsilon = len(SIZES), dict.fromkeys(SIZES, 0.0), 1 / len(SIZES)
    for t in range(1, 12):
        drawn = {name: loss for name, loss in probe(t).items() if (t + len(name)) % 3}
        for name, loss in drawn.items():
            assert loss.trained is not None
            cumulative[name] += loss.trained / 10 / p[name]
        before, epsilon = epsilon, min(1 / count, math.sqrt(math.log(count) / (count * t)))
        total = sum(math.exp(before * reward) for reward in cumulative.values())
        if t > 2:
            p = {
                name: (1 - count * epsilon) * math.exp(before * reward) / total + epsilon
                for name, reward in cumulative.items()
            }
        assert one.update({}, drawn) == pytest.approx(p, abs=1e-12)
    assert p["law"] != pytest.approx(SIZES["law"] / sum(SIZES.values()), abs=1e-3)


# ----------------------------------------------------------------------------------------------------------- ADO


def test_ado_draws_what_still_falls_fast() -> None:
    """Two domains alike but for their exponents; the proposal's running average moves slowly (inertia 0.9)."""
    one = ADO(ignore=0, warmup=10, refit=5)
    weights = one.initial({"fast": 50, "flat": 50})
    for n in range(1, 60):
        trained = {"fast": 1.0 + 4 * n**-0.3, "flat": 3.0}
        weights = one.update({}, losses(trained, trained=trained, tokens={"fast": 0.5, "flat": 0.5}))
        if n < 10:
            assert weights == {"fast": 0.5, "flat": 0.5}
    assert weights["fast"] > 0.9
    assert weights["flat"] >= 0.01 * (1 - 1e-9)


def test_ados_credit_favours_what_was_drawn() -> None:
    """With equal laws and rows, speed x rows x sqrt(h) is in the ratio of sqrt(h), h the moving average of shares."""
    one = ADO(ignore=0, warmup=10, refit=100, inertia=0.0)
    one.initial({"a": 50, "b": 50})
    for n in range(1, 11):
        trained = dict.fromkeys("ab", 1.0 + 4 * n**-0.3)
        weights = one.update({}, losses(trained, trained=trained, tokens={"a": 0.9, "b": 0.1}))
    left = 0.9**10  # of the first share, one half
    share = 0.5 * left + 0.9 * (1 - left)
    assert weights["a"] / weights["b"] == pytest.approx(math.sqrt(share / (1 - share)))


def test_ado_needs_updates_to_fit_to() -> None:
    with pytest.raises(ConfigError, match="at least 4 updates must lie between ignore and warmup"):
        ADO(ignore=10, warmup=12)


# ----------------------------------------------------------------------------------------------------------- gap


def test_gaps_golden_vector() -> None:
    """Signals [.04, .008, 0] over their largest, temperature .5, floor .1. Made here by gaps and falls: a .8 x .05 and
    b .08 x .1 with one window, and c does not fall."""
    one = Gap(windows=1, decay=0.0, least_kl=1e-9)
    weights = one.initial(EQUAL)
    one.first(weights, losses(dict.fromkeys(EQUAL, 1.0), kl={"a": 1.0, "b": 1.0, "c": 1.0}))
    one.update(weights, losses(dict.fromkeys(EQUAL, 1.0), kl={"a": 0.8 / 0.95, "b": 0.08 / 0.9, "c": 1.0}))
    found = one.update(weights, losses(dict.fromkeys(EQUAL, 1.0), kl={"a": 0.8, "b": 0.08, "c": 1.0}))
    assert list(found.values()) == pytest.approx([0.623469, 0.205687, 0.170844], abs=1e-6)


def test_gap_stays_uniform_without_progress_and_until_two_updates() -> None:
    one = scheduler("gap")
    weights = one.initial(SIZES)
    flat = losses(dict.fromkeys(SIZES, 1.0), kl=dict.fromkeys(SIZES, 1.0))
    one.first(weights, flat)
    assert (
        one.update(weights, losses(dict.fromkeys(SIZES, 1.0), kl=dict.fromkeys(SIZES, 0.5) | {"law": 0.1})) == weights
    )
    still = scheduler("gap")
    still.first(still.initial(SIZES), flat)
    for _ in range(5):
        assert still.update(weights, flat) == pytest.approx(dict.fromkeys(SIZES, 0.25))


@pytest.mark.parametrize(("name", "setting", "least"), [("gap", "floor", 0.1), ("ado", "least", 0.01)])
def test_floors_must_fit_the_number_of_domains(name: str, setting: str, least: float) -> None:
    count = int(1 / least) + 1
    with pytest.raises(ConfigError, match=f"domain_scheduler.{setting} is {least:g}, and {count} domains cannot"):
        scheduler(name).initial({f"d{i}": 1 for i in range(count)})


# --------------------------------------------------------------------------------------------------- token share


def test_token_share_gives_each_domain_its_share_of_the_loss() -> None:
    """Rows of a are 30 times as long as those of b: with weights / shares of rows as the loss weights of rows, each
    domain's share of the weighted targets is its target."""
    rows, tokens = {"a": 0.5, "b": 0.5}, {"a": 30 / 31, "b": 1 / 31}
    for target, wanted in ((None, {"a": 0.5, "b": 0.5}), ({"a": 1.0, "b": 3.0}, {"a": 0.25, "b": 0.75})):
        one = TokenShare(target=target)
        one.initial({"a": 5, "b": 5})
        weights = one.update({}, losses(rows, tokens=tokens))
        share = {name: tokens[name] * weights[name] / rows[name] for name in rows}
        total = sum(share.values())
        assert {name: value / total for name, value in share.items()} == pytest.approx(wanted)


def test_token_share_by_drawing_reaches_its_target() -> None:
    """Resampling: the share of targets that comes out of weights x lengths converges to equal shares."""
    one = TokenShare(actuator="resample", decay=0.0)
    weights = one.initial({"a": 5, "b": 5})
    for _ in range(50):
        total = 30 * weights["a"] + weights["b"]
        tokens = {"a": 30 * weights["a"] / total, "b": weights["b"] / total}
        weights = one.update(weights, losses(tokens, tokens=tokens))
    assert tokens == pytest.approx({"a": 0.5, "b": 0.5})


def test_token_share_counts_a_gap_within_bounds() -> None:
    one = TokenShare(gap_power=1.0, decay=0.0)
    weights = one.initial({"a": 5, "b": 5})
    tokens = {"a": 0.5, "b": 0.5}
    one.first(weights, losses(tokens, kl={"a": 1.0, "b": 1.0}))
    found = one.update(weights, losses(tokens, tokens=tokens, kl={"a": 0.5, "b": 0.25}))
    assert found["a"] / found["b"] == pytest.approx(2.0)
    bounded = one.update(weights, losses(tokens, tokens=tokens, kl={"a": 1e6, "b": 1e-6}))
    assert bounded["a"] / bounded["b"] == pytest.approx(20 / 0.05)


# ---------------------------------------------------------------------------------------------------- curriculum


def staged(*, keep: bool) -> tuple[Curriculum, list[dict[str, float]]]:
    one = Curriculum(
        stages=[{"steps": 4, "domains": ["law"]}, {"steps": 6, "domains": ["code"]}, {"domains": ["web", "prose"]}],
        keep=keep,
    )
    return one, run(one, [{}] * 7)


def test_stages_begin_after_their_steps() -> None:
    """Ends after steps 4 and 10, so an update every 2 steps: weights of the intervals from steps 1, 3, 5, 7, 9, 11 …"""
    one, weights = staged(keep=False)
    assert one.interval == 2
    drawn = [sorted(name for name, weight in each.items() if weight) for each in weights]
    assert drawn == [["law"]] * 2 + [["code"]] * 3 + [["prose", "web"]] * 2
    assert weights[-1] == pytest.approx({"code": 0, "law": 0, "prose": 100 / 109, "web": 9 / 109})


def test_kept_stages_are_growing_prefixes() -> None:
    _, weights = staged(keep=True)
    assert weights[2] == pytest.approx({"code": 300 / 340, "law": 40 / 340, "prose": 0, "web": 0})
    assert weights[-1] == pytest.approx(scheduler("natural").initial(SIZES))


@pytest.mark.parametrize(
    ("stages", "says"),
    [
        ([], "stages is empty"),
        ([{"domains": ["law"]}, {"domains": ["web"]}], r"stages\.0\.steps is None; give the optimizer steps"),
        ([{"steps": 0, "domains": ["law"]}, {"domains": ["web"]}], r"stages\.0\.steps is 0"),
        ([{"steps": 1, "domains": "law"}], r"stages\.0: give \{steps: 1000, domains: \[easy\]\}"),
        ([{"steps": 1, "domain": ["law"]}], r"stages\.0: give"),
        ([{"domains": ["lwa"]}], r"stages\.0: the data have no domain lwa; did you mean law"),
    ],
)
def test_stages_that_mean_nothing_are_refused(stages: list[dict[str, Any]], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Curriculum(stages=stages).initial(SIZES)


# ------------------------------------------------------------------------------------------------------ composed

SAME = {
    "ddk": {"signal": "perplexity_ratio", "floor": "mix", "least": 0.5, "first_interval": "r0"},
    "sheared": {"signal": "loss_gap", "floor": "mix", "least": 1e-4, "first_interval": "r0"},
    "velocitune": {"signal": "way_left", "floor": "mix", "least": 1e-4},
}


@pytest.mark.parametrize("name", SAME)
def test_parts_put_together_are_the_method(name: str) -> None:
    """DDK's r_0 has neither history nor floor, so it begins elsewhere; a fixed signal takes both to one fixed point."""
    same = {"first_interval": "r0"} if SAME[name].get("first_interval") else {}
    probes = [probe(0)] * 60 if name == "ddk" else [probe(seed) for seed in range(9)]
    parts, method = scheduler("composed", **SAME[name]), scheduler(name, **same)
    assert run(parts, probes)[-1] == pytest.approx(run(method, probes)[-1], abs=1e-9)


def test_a_moving_average_smooths_the_signal() -> None:
    """softmax of 0.75 x first + 0.25 x second."""
    one = scheduler("composed", signal="loss", update="softmax", floor="none", decay=0.75)
    weights = one.initial(EQUAL)
    one.update(weights, losses({"a": 1.0, "b": 2.0, "c": 3.0}))
    found = one.update(weights, losses({"a": 3.0, "b": 2.0, "c": 1.0}))
    assert found["c"] / found["a"] == pytest.approx(math.exp(2.5 - 1.5))


def test_averaged_weights_are_the_mean_of_the_proposals() -> None:
    one = scheduler("composed", signal="loss", update="average", floor="none")
    weights = one.initial({"a": 1, "b": 1})
    proposals = []
    for high in (1.0, 2.0, 0.5):
        weights = one.update(weights, losses({"a": high, "b": 0.0}))
        proposals.append(1 / (1 + math.exp(-high)))
    assert weights["a"] == pytest.approx(sum(proposals) / 3)


def test_learning_speed_finds_the_domain_that_falls() -> None:
    one = scheduler("composed", signal="learning_speed", update="softmax", floor="none", temperature=0.1)
    weights = one.initial({"a": 1, "b": 1})
    for n in range(1, 8):
        weights = one.update(weights, losses({"a": 1 + 4 * n**-0.5, "b": 3.0}))
    assert weights["a"] > 0.99


@pytest.mark.parametrize(("setting", "value"), [("signal", "nothing"), ("update", "magic"), ("floor", "wood")])
def test_a_part_that_does_not_exist_is_refused_with_those_that_do(setting: str, value: str) -> None:
    with pytest.raises(ConfigError, match=rf"domain_scheduler.{setting} is '{value}'; give one of"):
        scheduler("composed", **{setting: value})
