"""A judge's words become a score; what is no score makes no row."""

from __future__ import annotations

import json

import pytest

from kdcli.api import Example, Request
from kdcli.augmentation.judge import POINTS, Judge, score_of
from kdcli.store.examples import BadRow
from tests.desks import run

ROW = Example(prompt="Q", response="A", group="g", meta={"source": "here"})


def test_the_score_goes_to_the_row_and_the_reason_beside_it() -> None:
    rows = run(Judge(), [ROW], lambda request: "<reason>so so</reason>\n<score>6</score>")
    assert (rows[0].score, rows[0].meta["reason"], rows[0].group, rows[0].response) == (6.0, "so so", "g", "A")
    assert rows[0].meta["source"] == "here"
    assert len(rows[0].meta["written"]) == 1


@pytest.mark.parametrize("said", ["11", "-1", "good"])
def test_a_score_beyond_the_scale_makes_no_row(said: str) -> None:
    step = Judge()
    assert run(step, [ROW], lambda request: f"<reason>r</reason><score>{said}</score>") == []
    assert len(step.desk.set_aside) == 1


def test_aspects_are_averaged() -> None:
    aspects = {"instruction_following": 5, "truthfulness": 3, "honesty": 4, "helpfulness": 4}
    said = json.dumps({"critique": "c", "aspects": aspects})
    rows = run(Judge(prompt="judge/aspects"), [ROW], lambda request: said)
    assert (rows[0].score, rows[0].meta["aspects"], rows[0].meta["critique"]) == (4.0, aspects, "c")


def test_penalties_are_summed_and_no_errors_are_zero() -> None:
    one = {"span": "s", "kind": "k", "explanation": "e"}
    said = iter([{"errors": [{**one, "penalty": 3}, {**one, "penalty": 0.5}]}, {"errors": []}])
    rows = run(Judge(prompt="judge/error_analysis"), [ROW, ROW], lambda request: json.dumps(next(said)))
    assert [row.score for row in rows] == [-3.5, 0.0]


def test_verdicts_have_points() -> None:
    said = iter(["yes", "no"])
    rows = run(Judge(prompt="judge/yes_no"), [ROW, ROW], lambda request: next(said))
    assert [(row.score, row.meta["verdict"]) for row in rows] == [(1.0, "yes"), (0.0, "no")]
    other = run(Judge(prompt="judge/yes_no", points={"Yes": -2.0}), [ROW], lambda request: "yes")
    assert other[0].score == -2.0


def test_a_second_judge_may_write_elsewhere() -> None:
    first = run(Judge(), [ROW], lambda request: "<reason>r</reason><score>2</score>")
    rows = run(Judge(into="again"), first, lambda request: "<reason>r</reason><score>9</score>")
    assert (rows[0].score, rows[0].meta["again"]) == (2.0, 9.0)


def test_a_label_without_points_leaves_the_score() -> None:
    rows = run(Judge(prompt="judge/retrieve_needed"), [ROW], lambda request: "no")
    assert (rows[0].score, rows[0].meta["retrieve"]) == (None, "no")


def test_each_passage_is_judged_by_itself() -> None:
    passages = [{"text": "about cats", "id": 1}, {"text": "about dogs", "id": 2}]
    step = Judge(prompt="judge/relevance", over="passages")
    row = Example(prompt="cats?", meta={"passages": passages})

    def say(request: Request) -> str:
        return "informative" if "about cats" in request.messages[-1]["content"] else "distracting"

    rows = run(step, [row], say)
    assert [p["label"] for p in rows[0].meta["passages"]] == ["informative", "distracting"]
    assert [p["id"] for p in rows[0].meta["passages"]] == [1, 2]
    assert len(step.desk.asked) == 2
    assert run(step, [row, Example(prompt="x")], lambda request: "neither") == []
    assert step.desk.reasons == ["no choice", "no choice", "lacks a field"]


def test_principles_are_drawn_by_row_and_the_same_each_time() -> None:
    step = Judge(prompt="judge/principle", principles=["Be brief.", "Be kind.", "Be right."])
    rows = [Example(prompt=f"Q{i}", response="A") for i in range(30)]

    def asked() -> list[str]:
        run(step, rows, lambda request: "<reason>r</reason><score>1</score>")
        return [request.messages[-1]["content"] for _, request in step.desk.asked]

    first = asked()
    assert first == asked()
    assert {name for name in ("Be brief.", "Be kind.", "Be right.") if any(name in text for text in first)} == {
        "Be brief.",
        "Be kind.",
        "Be right.",
    }
    own = Example(prompt="Q", response="A", meta={"principle": "Mine alone."})
    run(step, [own], lambda request: "<reason>r</reason><score>1</score>")
    assert "Mine alone." in step.desk.asked[0][1].messages[-1]["content"]


@pytest.mark.parametrize(
    "record",
    [{"score": "much"}, {"score": float("nan")}, {"errors": [{"span": "no penalty"}]}, {"aspects": {"a": "b"}}],
)
def test_what_is_no_number_is_no_score(record: dict[str, object]) -> None:
    with pytest.raises(BadRow, match="number"):
        score_of(record, POINTS)
