"""Listwise rankings: scores by place, windows for long lists, and nothing but permutations."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable

import pytest

from kdcli.api import Answer, Example, Request
from kdcli.augmentation.rank import Rank, permutation
from kdcli.errors import ConfigError
from kdcli.store.examples import BadRow
from tests.desks import run

ROWS = [Example(prompt="Q", response=f"answer {quality}", group="g") for quality in (3, 1, 2, 5)]


def ranking(order: Iterable[int]) -> str:
    return " > ".join(f"[{i}]" for i in order)


def honest(request: Request) -> str:
    """The best first, by the numbers in what is shown."""
    found = [int(number) for number in re.findall(r"(?:answer|passage) (\d+)", request.messages[-1]["content"])]
    return ranking(i + 1 for i in sorted(range(len(found)), key=lambda i: -found[i]))


def test_scores_go_from_one_for_the_best_to_zero_for_the_last() -> None:
    step = Rank()
    rows = run(step, ROWS, honest)
    assert [row.score for row in rows] == [pytest.approx(score) for score in (2 / 3, 0.0, 1 / 3, 1.0)]
    assert [row.response for row in rows] == [row.response for row in ROWS]
    assert len(step.desk.asked) == 1


@pytest.mark.parametrize("wrong", [[1, 2, 3], [1, 2, 3, 3], [0, 1, 2, 3], [1, 2, 3, 4, 5]])
def test_what_is_no_permutation_sets_the_group_aside(wrong: list[int]) -> None:
    step = Rank()
    other = [Example(prompt="Z", response=f"answer {i}", group="h") for i in (1, 2)]
    rows = run(step, [*ROWS, *other], lambda r: honest(r) if "Z" in r.messages[-1]["content"] else ranking(wrong))
    assert [row.response for row in rows] == ["answer 1", "answer 2"]
    assert len(step.desk.set_aside) == 4


def test_an_invalid_ranking_is_asked_for_again() -> None:
    said = iter([ranking([1, 1, 2, 3]), ranking([4, 1, 3, 2])])
    step = Rank(attempts=2)
    assert [row.score for row in run(step, ROWS, lambda request: next(said))][3] == 1.0
    assert len({request.seed for _, request in step.desk.asked}) == 2


def test_writers_are_held_to_permutations_of_the_right_length() -> None:
    step = Rank()
    run(step, [*ROWS, *(Example(prompt="Z", response=f"answer {i}", group="h") for i in range(7))], honest)
    short, long = (str((request.form or {})["regex"]) for _, request in step.desk.asked)
    assert re.fullmatch(short, "[2] > [4] > [1] > [3]")
    assert not re.fullmatch(short, "[2] > [2] > [1] > [3]")
    assert not re.fullmatch(short, "[2] > [1] > [3]")
    assert re.fullmatch(long, ranking(range(1, 8)))
    assert not re.fullmatch(long, ranking(range(1, 7)))
    scores = Rank(prompt="rank/scores")
    run(scores, ROWS, lambda request: '{"scores": [1, 2, 3, 4]}')
    form = scores.desk.asked[0][1].form or {}
    assert (form["json"]["properties"]["scores"]["minItems"], form["json"]["properties"]["scores"]["maxItems"]) == (
        4,
        4,
    )


def test_passages_are_sorted_and_keep_what_they_had() -> None:
    passages = [{"text": f"passage {i}", "id": i} for i in (2, 9, 4)]
    row = Example(prompt="query", meta={"passages": passages})
    ranked = run(Rank(prompt="rank/permutation", over="passages"), [row], honest)[0]
    assert [(p["id"], p["rank"], p["score"]) for p in ranked.meta["passages"]] == [
        (9, 1, 1.0),
        (4, 2, 0.5),
        (2, 3, 0.0),
    ]
    assert ranked.score is None


def test_windows_bring_the_best_of_a_long_list_to_its_front() -> None:
    """A window of 4 that slides by 2 carries the best 2 of each window on, so the first 2 are the best of all."""
    numbers = random.Random(1).sample(range(100), 15)
    row = Example(prompt="query", meta={"passages": [{"text": f"passage {n}", "id": n} for n in numbers]})
    step = Rank(prompt="rank/permutation", over="passages", window=4, stride=2)
    ranked = run(step, [row], honest)[0]
    ids = [p["id"] for p in ranked.meta["passages"]]
    assert ids[:2] == sorted(numbers, reverse=True)[:2]
    assert sorted(ids) == sorted(numbers)
    assert len(step.desk.asked) == 7, "windows that end at 15, 13, 11, 9, 7, 5 and 3"
    assert all(len(re.findall(r"passage \d", r.messages[-1]["content"])) <= 4 for _, r in step.desk.asked)


def test_scores_of_a_list_are_used_as_they_are() -> None:
    rows = run(Rank(prompt="rank/scores"), ROWS, lambda request: '{"scores": [3, 1.5, 2, 6]}')
    assert [row.score for row in rows] == [3.0, 1.5, 2.0, 6.0]
    step = Rank(prompt="rank/scores")
    assert run(step, ROWS, lambda request: '{"scores": [3, 1]}') == []
    assert step.desk.reasons[0] == "wrong number of scores"


def test_a_failed_call_sets_its_whole_group_aside_once() -> None:
    step = Rank()
    assert run(step, ROWS, lambda request: Answer(failed="HTTP 500")) == []
    assert step.desk.reasons == ["HTTP 500", *["no ranking of its group"] * 3]


def test_lone_answers_and_rows_without_passages_are_set_aside() -> None:
    step = Rank()
    assert run(step, [Example(prompt="Q", response="A")], honest) == []
    assert step.desk.reasons == ["alone in its group"]
    over = Rank(prompt="rank/permutation", over="passages")
    assert run(over, [Example(prompt="Q")], honest) == []
    assert over.desk.reasons == ["lacks a field"]


def test_a_rehearsal_ranks_lists_of_any_length() -> None:
    assert len(run(Rank(), ROWS, rehearsal=True)) == 4


@pytest.mark.parametrize(("said", "order"), [("[2] > [1]", [2, 1]), ("2, 1", [2, 1]), ([1, 2], [1, 2])])
def test_permutations_are_read_from_lists_and_text(said: object, order: list[int]) -> None:
    assert permutation(said, 2) == order


@pytest.mark.parametrize("said", ["", "1", ["x", 2], None, [1, 1]])
def test_anything_else_is_no_permutation(said: object) -> None:
    with pytest.raises(BadRow, match="ranking"):
        permutation(said, 2)


def test_a_stride_beyond_the_window_is_refused() -> None:
    with pytest.raises(ConfigError, match="stride"):
        Rank(window=4, stride=4)
