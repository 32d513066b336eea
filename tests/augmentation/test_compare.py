"""Pairwise verdicts: what depends on the order counts for nothing, and the rest adds up."""

from __future__ import annotations

import random
import re

import pytest

from kdcli.api import Answer, Example, Request
from kdcli.augmentation.compare import Compare
from kdcli.errors import ConfigError
from tests.desks import run

ROWS = [Example(prompt="Q", response=f"answer {quality}", group="g") for quality in (3, 1, 2, 5)]


def shown(request: Request) -> tuple[int, int]:
    """The qualities that stand first and second."""
    first, second = re.findall(r"answer (\d)", request.messages[-1]["content"])
    return int(first), int(second)


def verdict(winner: str) -> str:
    return f"<reason>because</reason>\n<winner>{winner}</winner>"


def honest(request: Request) -> str:
    first, second = shown(request)
    return verdict("first" if first > second else "second" if second > first else "tie")


def test_scores_are_shares_of_comparisons_won() -> None:
    step = Compare()
    rows = run(step, ROWS, honest)
    assert [row.score for row in rows] == [pytest.approx(share) for share in (2 / 3, 0.0, 1 / 3, 1.0)]
    assert len(step.desk.asked) == 4 * 3
    assert [row.response for row in rows] == [row.response for row in ROWS]
    assert rows[0].meta["comparisons"][0] == {"other": "answer 1", "result": "won", "reason": "because"}


@pytest.mark.parametrize("seat", ["first", "second"])
def test_a_judge_who_likes_a_seat_says_nothing(seat: str) -> None:
    rows = run(Compare(), ROWS, lambda request: verdict(seat))
    assert [row.score for row in rows] == [0.5] * 4
    assert {one["result"] for row in rows for one in row.meta["comparisons"]} == {"tie"}
    once = run(Compare(both_orders=False), ROWS, lambda request: verdict(seat))
    assert len({row.score for row in once}) == 4, "in one order the seat decides everything"


def test_scores_do_not_depend_on_the_order_of_rows_and_sum_to_half_the_group() -> None:
    expected = {row.response: row.score for row in run(Compare(), ROWS, honest)}
    shuffled = random.Random(0).sample(ROWS, 4)
    assert {row.response: row.score for row in run(Compare(), shuffled, honest)} == expected
    assert sum(row.score or 0.0 for row in run(Compare(), ROWS, honest)) == pytest.approx(2.0)


def test_a_referees_ratings_are_averaged_over_both_orders() -> None:
    def say(request: Request) -> str:
        first, second = shown(request)  # a referee who gives the first seat a point for nothing
        return f"<reason>r</reason><first_score>{first + 1}</first_score><second_score>{second}</second_score>"

    rows = run(Compare(prompt="compare/referee", score="rating"), [ROWS[0], ROWS[3]], say)
    assert [row.score for row in rows] == [3.5, 5.5]
    close = run(Compare(prompt="compare/referee"), [ROWS[0], ROWS[2]], say)
    assert [row.score for row in close] == [0.5, 0.5], "4 to 2 in one order and 3 to 3 in the other is a tie"


def test_a_comparison_with_one_order_missing_does_not_count() -> None:
    def say(request: Request) -> str | Answer:
        return Answer(failed="HTTP 500") if shown(request) == (1, 3) else honest(request)

    step = Compare()
    rows = run(step, ROWS, say)
    assert [row.score for row in rows] == [0.5, 0.0, pytest.approx(1 / 3), 1.0]  # 3: beats 2, loses to 5
    assert step.desk.reasons == ["HTTP 500"]
    assert step.desk.set_aside[0][0].response is None, "the pair is set aside, and not one of the answers"


def test_an_answer_alone_is_set_aside_and_groups_keep_apart() -> None:
    step = Compare()
    rows = run(step, [*ROWS[:2], Example(prompt="Z", response="answer 9"), *ROWS[2:3]], honest)
    assert [row.response for row in rows] == ["answer 3", "answer 1"]
    assert step.desk.reasons == ["alone in its group", "alone in its group"]


def test_answers_that_the_step_is_not_for_are_not_compared() -> None:
    step = Compare(only="response != 'answer 5'")
    rows = run(step, ROWS, honest)
    assert rows[3] == ROWS[3]
    assert [row.score for row in rows] == [1.0, 0.0, 0.5, None]
    assert len(step.desk.asked) == 3 * 2


def test_a_prompt_that_names_no_winner_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs winner or first_score and second_score"):
        Compare(prompt="judge/score")
