"""Preference pairs of groups: who is chosen, who is rejected, and what is no preference."""

from __future__ import annotations

from collections import Counter

import pytest

from kdcli.api import Example
from kdcli.augmentation.pair import Pair
from kdcli.errors import ConfigError
from kdcli.store.examples import content_key, parse_example
from tests.desks import run


def group(name: str, *scores: float | None, by: str = "student") -> list[Example]:
    return [
        Example(
            prompt=f"Q {name}",
            response=f"{name}{i} scored {score}",
            group=name,
            score=score,
            domain="d",
            meta={"by": "data" if i == 0 else by, "source": "s", "license": "MIT", "written": [{"by": i}]},
        )
        for i, score in enumerate(scores)
    ]


def test_best_against_worst_with_the_provenance_of_both() -> None:
    rows = group("a", 2.0, 5.0, 1.0)
    pair = run(Pair(), rows)[0]
    assert (pair.prompt, pair.chosen, pair.rejected, pair.domain) == ("Q a", "a1 scored 5.0", "a2 scored 1.0", "d")
    assert pair.meta["parents"] == [content_key(rows[1]), content_key(rows[2])]
    assert pair.meta["written"] == [{"by": 1}, {"by": 2}]
    assert (pair.meta["license"], pair.meta["scores"], pair.meta["by"]) == ("MIT", [5.0, 1.0], ["student", "student"])
    assert (pair.response, pair.score, pair.kind) == (None, None, "preference")
    parse_example({"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected, "meta": dict(pair.meta)})


def test_one_row_per_group_in_order() -> None:
    rows = [*group("a", 1.0, 2.0), *group("b", 2.0, 1.0), *group("c", 1.0, 3.0, 2.0)]
    assert [pair.prompt for pair in run(Pair(), rows)] == ["Q a", "Q b", "Q c"]


def test_ties_are_set_aside_and_counted() -> None:
    rows = [*group("a", 3.0, 3.0), *group("b", 3.0, 2.6), *group("c", 5.0, 1.0)]
    step = Pair(margin=0.5)
    assert [pair.prompt for pair in run(step, rows)] == ["Q c"]
    assert step.desk.reasons == ["tie", "tie"]
    assert len(run(Pair(margin=0.5, keep_ties=True), rows)) == 3


def test_the_datas_answer_may_be_chosen_without_scores() -> None:
    """SPIN: the data's answer against the student's own."""
    pair = run(Pair(chosen="meta.by == 'data'", rejected="meta.by == 'student'"), group("a", None, None))[0]
    assert (pair.meta["by"], pair.chosen) == (["data", "student"], "a0 scored None")


def test_a_chosen_row_that_scores_below_the_rejected_makes_no_pair() -> None:
    step = Pair(chosen="meta.by == 'data'", rejected="worst")
    assert run(step, group("a", 1.0, 2.0)) == []
    assert step.desk.reasons == ["chosen is worse"]


def test_random_draws_evenly_among_the_worse_and_always_alike() -> None:
    rows = [row for i in range(300) for row in group(f"g{i}", 9.0, 9.0, 3.0, 2.0)]
    found = run(Pair(rejected="random"), rows)
    assert found == run(Pair(rejected="random"), rows)
    drawn = Counter(str(pair.rejected)[-3:] for pair in found)
    assert drawn.keys() == {"3.0", "2.0"}, "an equal score is no worse answer"
    assert 110 < drawn["3.0"] < 190


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        (group("a", 1.0), "one answer only"),
        (group("a", 1.0, None), "no score"),
        ([*group("a", 1.0), Example(prompt="Q a", group="a")], "one answer only"),
        ([Example(prompt="Q", response="same", group="g", score=float(i)) for i in range(2)], "equal answers"),
    ],
)
def test_what_is_no_preference_is_set_aside(rows: list[Example], reason: str) -> None:
    step = Pair()
    assert run(step, rows) == []
    assert step.desk.reasons == [reason]


def test_a_margin_needs_scores() -> None:
    step = Pair(chosen="meta.by == 'data'", margin=1.0)
    assert run(step, group("a", None, None)) == []
    assert step.desk.reasons == ["no score"]


def test_an_expression_that_nothing_fits_sets_the_group_aside() -> None:
    step = Pair(chosen="meta.by == 'human'")
    assert run(step, group("a", 1.0, 2.0)) == []
    assert step.desk.reasons == ["none to be chosen"]


def test_licences_of_both_are_kept() -> None:
    one, other = group("a", 1.0, 2.0)
    mixed = Example(**{**vars(other), "meta": {**other.meta, "license": ["MIT", "Apache-2.0"]}})
    assert run(Pair(), [one, mixed])[0].meta["license"] == ["Apache-2.0", "MIT"]


def test_a_rehearsal_keeps_a_pair_of_every_group() -> None:
    rows = [*group("a", None, None), *group("b", 1.0, 1.0)]
    assert len(run(Pair(chosen="meta.by == 'human'", margin=2.0), rows, rehearsal=True)) == 2


@pytest.mark.parametrize("settings", [{"margin": -1.0}, {"chosen": "meta.by =="}, {"rejected": "colour == 1"}])
def test_wrong_settings_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="pair"):
        Pair(**settings)  # type: ignore[arg-type]
