from dataclasses import replace

import pytest

from kdcli.api import Example
from kdcli.augmentation.vote import Vote
from kdcli.errors import ConfigError
from tests.desks import run


def group(name, *responses, **meta):
    return [Example(prompt=name, response=response, group=name, meta=meta) for response in responses]


def test_the_majority_is_by_value_and_its_rows_stay_together():
    rows = group("a", r"So \boxed{\frac{1}{2}}", "It is 3.", "The answer is 0.5.") + group("b", "It is 7.", "It is 8.")
    step = Vote()
    kept = run(step, rows)
    assert [(one.group, one.response) for one in kept] == [
        ("a", r"So \boxed{\frac{1}{2}}"),
        ("a", "The answer is 0.5."),
        ("b", "It is 7."),
    ]
    assert [one.meta["share"] for one in kept] == [2 / 3, 2 / 3, 1 / 2]
    assert [one.meta["answer"] for one in kept] == [r"\frac{1}{2}"] * 2 + ["7"]
    assert step.desk.reasons == ["outvoted", "outvoted"]


def test_of_equal_counts_the_first_given_wins():
    rows = group("a", "y", "x", "x", "y", "z")
    assert {one.response for one in run(Vote(method="exact"), rows)} == {"y"}
    assert {one.response for one in run(Vote(method="exact"), rows[1:])} == {"x"}


def test_one_row_is_kept_where_one_is_asked_for():
    step = Vote(method="exact", keep="one")
    assert [one.response for one in run(step, group("a", "X", "x ", "y"))] == ["X"]
    assert step.desk.reasons == ["one is enough", "outvoted"]


def test_groups_without_a_majority_are_set_aside():
    step = Vote(method="choice", min_share=0.6)
    kept = run(step, group("a", "(A)", "(B)") + group("b", "(C)", "(C)", "none"))
    assert [one.group for one in kept] == ["b", "b"]
    assert step.desk.reasons == ["no majority", "no majority", "outvoted"]


def test_a_group_that_gives_no_answer_is_set_aside():
    step = Vote()
    assert run(step, group("a", "Who knows?", "Not I.")) == []
    assert step.desk.reasons == ["no answer", "no answer"]


def test_a_gold_answer_is_not_overwritten_and_rows_alone_are_their_own_majority():
    alone = [replace(one, group=None) for one in group("a", "It is 3.", "It is 4.", answer="9")]
    assert [(one.meta["answer"], one.meta["share"]) for one in run(Vote(), alone)] == [("9", 1.0)] * 2


def test_blocks_do_not_change_the_outcome():
    rows = [one for n in range(40) for one in group(f"g{n}", "x", "y", "y")]
    assert len(run(Vote(method="exact"), rows)) == 80
    assert len(run(Vote(method="exact"), rows, rehearsal=True)) == 120


def marked(name: str, *marks: bool | None) -> list[Example]:
    rows = group(name, *(f"{name}{n}" for n in range(len(marks))))
    return [
        one if mark is None else replace(one, meta={**one.meta, "correct": mark})
        for one, mark in zip(rows, marks, strict=True)
    ]


def test_the_share_of_right_answers_is_the_expected_accuracy_also_where_it_is_nothing():
    rows = marked("a", False, True, True, False) + marked("b", False, False) + marked("c", True, None)
    step = Vote(method="correct", keep="one")
    kept = run(step, rows)
    assert [(one.response, one.meta["share"]) for one in kept] == [("a1", 0.5), ("b0", 0.0), ("c0", 1.0)]
    assert sorted(step.desk.reasons) == ["no mark", "one is enough", "wrong answer", "wrong answer", "wrong answer"]
    assert [one.response for one in run(Vote(method="correct"), rows)] == ["a1", "a2", "b0", "c0"]
    assert [one.group for one in run(Vote(method="correct", min_share=0.5), rows)] == ["a", "a", "c"]


def test_wrong_settings_are_named():
    with pytest.raises(ConfigError, match=r"vote\.extract"):
        Vote(method="correct", extract="x")
    with pytest.raises(ConfigError, match=r"vote\.min_share"):
        Vote(min_share=2.0)
    with pytest.raises(ConfigError, match=r"vote\.keep"):
        Vote(keep="all")  # pyright: ignore
