"""Rollout: answers of the student stand beside those of the data, and everybody can tell whose is whose."""

from __future__ import annotations

import pytest

from kdcli.api import Answer, Example, Request
from kdcli.augmentation.rollout import Rollout
from kdcli.errors import ConfigError
from tests.desks import run

ROWS = [
    Example(prompt="One?", response="1", meta={"answer": "1", "critique": "of the old answer", "license": "MIT"}),
    Example(prompt="Two?"),
]


def numbered(request: Request) -> list[str]:
    return [f"{request.messages[-1]['content']} {sample}" for sample in range(request.n)]


def test_answers_stand_behind_the_datas_in_one_group() -> None:
    rows = run(Rollout(n=2), ROWS, numbered)
    assert [(row.prompt, row.response, row.meta["by"]) for row in rows] == [
        ("One?", "1", "data"),
        ("One?", "One? 0", "student"),
        ("One?", "One? 1", "student"),
        ("Two?", "Two? 0", "student"),
        ("Two?", "Two? 1", "student"),
    ]
    assert [row.group for row in rows] == [rows[0].group] * 3 + [rows[3].group] * 2
    assert rows[0].group != rows[3].group


def test_a_rollout_knows_the_gold_answer_and_nothing_that_was_said_of_another() -> None:
    answered = run(Rollout(), ROWS[:1], numbered)[1]
    assert answered.meta["answer"] == "1"
    assert answered.meta["license"] == "MIT"
    assert answered.meta["reference"] == "1"
    assert "critique" not in answered.meta
    assert [entry["by"] for entry in answered.meta["written"]] == ["student"]


def test_without_keep_the_own_answer_is_a_reference_alone() -> None:
    rows = run(Rollout(keep=False), ROWS, numbered)
    assert [row.response for row in rows] == ["One? 0", "Two? 0"]
    assert rows[0].meta["reference"] == "1"


def test_a_prompt_is_asked_once_however_many_answers_its_group_has() -> None:
    group = [Example(prompt="P", response=text, group="g", meta={"by": "teacher"}) for text in "abc"]
    step = Rollout()
    rows = run(step, group, numbered)
    assert len(step.desk.asked) == 1
    assert [row.meta["by"] for row in rows] == ["teacher"] * 3 + ["student"]
    assert {row.group for row in rows} == {"g"}


def test_a_failed_call_sets_the_question_aside_and_leaves_the_datas_answer() -> None:
    step = Rollout()
    rows = run(step, ROWS, lambda request: Answer(failed="HTTP 500"))
    assert [row.response for row in rows] == ["1"]
    assert [(row.prompt, row.response) for row, _ in step.desk.set_aside] == [("One?", None), ("Two?", None)]
    assert step.desk.reasons == ["HTTP 500"] * 2


def test_rows_that_the_step_is_not_for_pass_unchanged_in_place() -> None:
    rows = run(Rollout(only="response is not defined"), ROWS, numbered)
    assert rows[0] == ROWS[0]
    assert [row.response for row in rows] == ["1", "Two? 0"]


def test_equal_prompts_of_different_rows_are_drawn_apart() -> None:
    step = Rollout()
    run(step, [Example(prompt="P", response="a"), Example(prompt="P", response="b")], numbered)
    seeds = [request.seed for _, request in step.desk.asked]
    assert len(set(seeds)) == 2


def test_a_prompt_file_without_a_response_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs response"):
        Rollout(prompt="judge/score")
