"""Critique and revision: the answer that stays, and the whole way to it."""

from __future__ import annotations

import pytest

from kdcli.api import Answer, Example, Request
from kdcli.augmentation.critique import Critique
from kdcli.errors import ConfigError
from tests.desks import run

ROW = Example(prompt="Q", response="draft", meta={"answer": "gold"})


def refined(request: Request) -> str:
    """Revision i + 1 of what is shown; critiques and revisions tell which version they saw."""
    text = request.messages[-1]["content"]
    version = max((i for i in range(9) if f"version {i}" in text), default=0)
    return f"version {version + 1}" if "Write the answer anew" in text else f"critique of version {version}"


def test_a_revision_replaces_the_draft_and_the_whole_way_is_kept() -> None:
    row = run(Critique(), [ROW], refined)[0]
    assert (row.response, row.meta["draft"], row.meta["critique"]) == ("version 1", "draft", "critique of version 0")
    assert row.meta["chain"] == [
        {"kind": "draft", "text": "draft"},
        {"kind": "critique", "text": "critique of version 0"},
        {"kind": "revision", "text": "version 1"},
    ]
    assert row.meta["answer"] == "gold"
    assert len(row.meta["written"]) == 2


def test_each_round_sees_the_last_revision_and_its_own_critique() -> None:
    step = Critique(rounds=3)
    row = run(step, [ROW, ROW], refined)[0]
    assert row.response == "version 3"
    assert [link["text"] for link in row.meta["chain"]] == [
        "draft",
        "critique of version 0",
        "version 1",
        "critique of version 1",
        "version 2",
        "critique of version 2",
        "version 3",
    ]
    texts = [request.messages[-1]["content"] for _, request in step.desk.asked]
    assert ["critique of" in text for text in texts] == [False, False, True, True] * 3, "one wave after the other"


def test_a_round_ends_where_the_critique_is_satisfied() -> None:
    said = iter(["<critique>c1</critique><score>2</score>", "better", "<critique>c2</critique><score>4</score>"])
    step = Critique(prompt="critique/scored", rounds=5, stop="score >= 4")
    row = run(step, [ROW], lambda request: next(said))[0]
    assert (row.response, row.score) == ("better", 4.0)
    assert [link.get("score") for link in row.meta["chain"]] == [None, 2.0, None, 4.0]
    assert len(step.desk.asked) == 3


def test_feedback_that_asks_for_no_revision_leaves_the_answer() -> None:
    step = Critique(prompt="critique/self_feedback", stop="revise == 'no'")
    row = run(step, [ROW], lambda request: "<critique>fine</critique><revise>no</revise>")[0]
    assert (row.response, row.meta["revise"], len(step.desk.asked)) == ("draft", "no", 1)


def test_without_a_revision_the_critique_is_kept() -> None:
    row = run(Critique(revise=None), [ROW], refined)[0]
    assert (row.response, row.meta["critique"]) == ("draft", "critique of version 0")


def test_a_prompt_that_mends_at_once_needs_no_second_call() -> None:
    step = Critique(prompt="critique/fix_code", revise=None)
    broken = Example(prompt="add", response="def f(): retrun 1", meta={"error": "SyntaxError", "tests": ["assert f()"]})
    row = run(step, [broken], lambda request: "A typo.\n```python\ndef f(): return 1\n```")[0]
    assert (row.response, row.meta["draft"]) == ("def f(): return 1", "def f(): retrun 1")
    assert [link["kind"] for link in row.meta["chain"]] == ["draft", "revision"]
    text = step.desk.asked[0][1].messages[-1]["content"]
    assert all(part in text for part in ("retrun 1", "SyntaxError", "assert f()")), "it is this attempt that is mended"
    assert len(step.desk.asked) == 1


def test_several_refinements_are_rows_of_one_group() -> None:
    step = Critique(revise="critique/feedback_refine", n=3)
    rows = run(step, [ROW], lambda request: [f"text {i}" for i in range(request.n)])
    assert [row.response for row in rows] == ["text 0", "text 1", "text 2"]
    assert len({row.group for row in rows}) == 1
    assert rows[0].group is not None
    assert [request.n for _, request in step.desk.asked] == [1, 3]


def test_the_same_principle_guides_critique_and_revision() -> None:
    principles = [f"Principle number {i}." for i in range(20)]
    step = Critique(prompt="critique/principle", revise="critique/revise_principle", rounds=2, principles=principles)
    run(step, [ROW], lambda request: "text")
    seen = [next(p for p in principles if p in r.messages[-1]["content"]) for _, r in step.desk.asked]
    assert seen[0] == seen[1]
    assert seen[2] == seen[3]
    assert seen[0] != seen[2], "each round draws anew"


@pytest.mark.parametrize("fails", ["critique", "revision"])
def test_a_row_whose_call_fails_is_set_aside_and_no_other(fails: str) -> None:
    other = Example(prompt="Other", response="draft")

    def say(request: Request) -> str | Answer:
        text = request.messages[-1]["content"]
        late = "Write the answer anew" in text
        return Answer(failed="HTTP 500") if "Other" in text and late == (fails == "revision") else refined(request)

    step = Critique()
    rows = run(step, [other, ROW], say)
    assert [row.prompt for row in rows] == ["Q"]
    assert [(row.prompt, reason) for row, reason in step.desk.set_aside] == [("Other", "HTTP 500")]


def test_rows_without_an_answer_are_set_aside_and_others_pass_in_place() -> None:
    step = Critique(only="meta.bad is not defined")
    passing = Example(prompt="P", response="R", meta={"bad": True})
    rows = run(step, [passing, Example(prompt="Q"), ROW], refined)
    assert rows[0] == passing
    assert [row.prompt for row in rows] == ["P", "Q"]
    assert step.desk.reasons == ["no response"]


def test_a_rehearsal_goes_through_every_round() -> None:
    step = Critique(prompt="critique/scored", rounds=3, stop="score >= 1")
    assert len(run(step, [ROW], rehearsal=True)) == 1
    assert len(step.desk.asked) == 6


def test_a_stop_that_names_no_field_of_the_critique_is_refused() -> None:
    with pytest.raises(ConfigError, match="points"):
        Critique(stop="points > 3")
