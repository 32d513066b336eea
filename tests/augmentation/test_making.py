"""Steps that make rows: label, curate, rewrite, annotate, contrast, expand, evolve, reshape."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from kdcli.api import Example, Request
from kdcli.augmentation.annotate import Annotate
from kdcli.augmentation.contrast import Contrast
from kdcli.augmentation.curate import Curate
from kdcli.augmentation.evolve import Evolve
from kdcli.augmentation.expand import Expand
from kdcli.augmentation.label import Label
from kdcli.augmentation.reshape import Reshape
from kdcli.augmentation.rewrite import Rewrite
from kdcli.errors import ConfigError
from kdcli.store.examples import content_key
from tests.desks import FakeDesk, run

SEED = {"source": "seeds", "license": "CC0-1.0"}


def rows(count: int, **fields: Any) -> list[Example]:
    return [Example(prompt=f"question {i}", domain="d", meta={**SEED, "id": i}, **fields) for i in range(count)]


def echo(request: Request) -> list[str]:
    return [f"sample {i} for {request.messages[-1]['content']}" for i in range(request.n)]


def tagged(*tags: str) -> Callable[[Request], list[str]]:
    """Each tag filled with words that differ between requests and samples."""

    def say(request: Request) -> list[str]:
        return [
            "\n".join(f"<{tag}>{tag} {words(f'{request.seed} {request.messages} {i}')}</{tag}>" for tag in tags)
            for i in range(request.n)
        ]

    return say


def words(key: str, count: int = 6) -> str:
    draw = random.Random(key)
    return " ".join("".join(draw.choices("abcdefghijklmnop", k=6)) for _ in range(count))


# ------------------------------------------------------------------------------------------------------- label


@pytest.mark.parametrize("keep", [False, True])
def test_samples_of_a_prompt_stand_together_in_one_group(keep: bool) -> None:
    made = run(Label(n=3, keep=keep), rows(4, response="old"), echo)
    size = 4 if keep else 3
    assert len(made) == 4 * size
    for i in range(4):
        group = made[i * size : (i + 1) * size]
        assert {row.prompt for row in group} == {f"question {i}"}
        assert len({row.group for row in group}) == 1
        assert len({row.response for row in group}) == size
        assert [row.response == "old" for row in group] == [keep] + [False] * (size - 1)
    assert len({row.group for row in made}) == 4


def test_an_older_answer_becomes_the_reference_and_its_score_goes() -> None:
    (made,) = run(Label(), rows(1, response="old", score=3.0), echo)
    assert made.meta["reference"] == "old"
    assert made.score is None
    assert made.group is None
    assert [entry["by"] for entry in made.meta["written"]] == ["teacher"]
    assert made.meta["license"] == "CC0-1.0"


def test_the_student_sees_the_prompt_without_the_teachers_instructions() -> None:
    given = [Example(prompt="How much is 7 * 12?", meta={"answer": "84"})]
    step = Label(prompt="label/hint", keep_teacher_prompt=True)
    (made,) = run(step, given, lambda _: "7 times 12 is 84.\nTherefore, the answer is 84.")
    assert made.prompt == "How much is 7 * 12?"
    assert "The correct answer is 84" in (made.teacher_prompt or "")
    assert made.meta["final"] == "84"
    assert "84" not in (made.prompt or "")


def test_a_text_becomes_the_document_of_its_label() -> None:
    (made,) = run(Label(prompt="label/summarize"), [Example(text="Salt is gained from the sea.")], lambda _: "Salt.")
    assert made.kind == "response"
    assert made.prompt == "Summarize: Salt is gained from the sea."
    assert made.meta["document"] == "Salt is gained from the sea."


def test_a_row_that_has_no_prompt_for_the_student_is_set_aside() -> None:
    step = Label(prompt="label/demos")
    assert run(step, [Example(text="only text", meta={"demos": []})], echo) == []
    assert step.desk.reasons == ["lacks a field"]  # type: ignore[attr-defined]


def test_a_prompt_file_whose_record_is_no_answer_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"label: evolve/deepen reads prompt from an answer.*needs response"):
        Label(prompt="evolve/deepen")
    with pytest.raises(ConfigError, match=r"label\.n is 0"):
        Label(n=0)


# ------------------------------------------------------------------------------------------------------ curate


def test_each_record_is_a_row_that_names_its_source() -> None:
    given = [Example(text="Salt is mined.", domain="d", meta={**SEED, "id": "x", "topic": "salt", "answer": "no"})]
    made = run(Curate(n=2, keep_source=True), given, tagged("question", "answer"))
    assert made[0] is given[0]
    assert len(made) == 3
    for row in made[1:]:
        assert row.kind == "response"
        assert row.meta["parents"] == [content_key(given[0])]
        assert row.meta["document"] == "Salt is mined."
        assert row.meta["topic"] == "salt"
        assert (row.meta["source"], row.meta["license"], row.domain) == ("seeds", "CC0-1.0", "d")
        assert not {"id", "answer"} & row.meta.keys()
        assert len(row.meta["written"]) == 1


def test_a_label_conditioned_text_is_the_students_prompt() -> None:
    given = [Example(text="positive review", meta={"label": "positive", "topic": "review"})]
    (made,) = run(Curate(prompt="curate/label_conditioned"), given, lambda _: "<text>Warm and kind.</text>")
    assert (made.prompt, made.meta["label"]) == ("Warm and kind.", "positive")


def test_a_dialogue_in_one_call_is_a_chat() -> None:
    (made,) = run(Curate(prompt="curate/dialogue_one_call"), [Example(prompt="basil")])
    assert made.kind == "messages"
    assert made.messages is not None
    assert made.messages[-1]["role"] == "assistant"


def test_a_chat_without_an_assistant_is_set_aside() -> None:
    step = Curate(prompt="curate/dialogue_one_call")
    alone = '{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}'
    assert run(step, [Example(prompt="basil")], lambda _: alone) == []
    assert step.desk.reasons == ["wrong JSON"]  # type: ignore[attr-defined]


# ---------------------------------------------------------------------------------------- rewrite and annotate


def test_a_rewritten_prompt_keeps_the_rest_of_its_row() -> None:
    given = rows(2, response="positive", score=1.0)
    made = run(Rewrite(n=2, keep=True), given, tagged("paraphrase"))
    assert [row.response for row in made] == ["positive"] * 6
    assert [row.prompt == f"question {i // 3}" for i, row in enumerate(made)] == [True, False, False] * 2
    for i in (1, 2):
        assert made[i].meta["original"] == "question 0"
        assert made[i].meta["parents"] == [content_key(given[0])]
        assert (made[i].score, made[i].group) == (None, None)


def test_versions_of_a_response_are_a_group() -> None:
    made = run(
        Rewrite(prompt="rewrite/quality", field="response", n=2, keep=True), rows(2, response="x"), tagged("answer")
    )
    assert [row.group for row in made] == [made[0].group] * 3 + [made[3].group] * 3
    assert made[0].group != made[3].group
    assert made[0].group is not None


def test_a_text_may_become_a_question_with_its_answer() -> None:
    step = Rewrite(prompt="rewrite/as_question_answer", field="text")
    (made,) = run(step, [Example(text="Salt is mined.")], tagged("question", "answer"))
    assert (made.kind, made.meta["original"]) == ("response", "Salt is mined.")


def test_marks_may_not_change_the_text() -> None:
    strip = r"\[[^\]]*\]"
    said = {"2 + 2 is 4.": "2 + 2 is [Calculator(2 + 2)] 4.", "3 + 3 is 6.": "3 plus 3 is [Calculator(3 + 3)] 6."}
    step = Annotate(strip=strip)
    given = [Example(text=text) for text in said]
    made = run(step, given, lambda r: f"<marked>{said[r.messages[-1]['content'].split('Text: ')[-1]]}</marked>")
    assert [row.text for row in made] == ["2 + 2 is [Calculator(2 + 2)] 4."]
    assert made[0].meta["original"] == "2 + 2 is 4."
    assert step.desk.reasons == ["changed the text"]  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"annotate\.strip.*no regular expression"):
        Annotate(strip="[")


# ---------------------------------------------------------------------------------------------------- contrast


def test_contrast_makes_pairs_of_two_ways_to_ask() -> None:
    given = rows(3, response="old")
    step = Contrast(writer_bad="small", only="meta.id != 1")
    assert list(step.writers()) == ["teacher", "small"]
    made = run(step, given, lambda r: "bad" if "little use" in r.messages[0]["content"] else "good")
    assert [row.kind for row in made] == ["preference", "response", "preference"]
    assert made[1] is given[1]
    assert (made[0].prompt, made[0].chosen, made[0].rejected) == ("question 0", "good", "bad")
    assert made[0].meta["reference"] == "old"
    assert [entry["by"] for entry in made[0].meta["written"]] == ["teacher", "small"]


def test_equal_answers_and_half_pairs_are_set_aside_once() -> None:
    step = Contrast()
    assert run(step, rows(2), lambda _: "same") == []
    assert step.desk.reasons == ["no contrast"] * 2  # type: ignore[attr-defined]
    step = Contrast()
    assert run(step, rows(2), lambda r: "" if "little use" in r.messages[0]["content"] else "good") == []
    assert step.desk.reasons == ["empty answer"] * 2  # type: ignore[attr-defined]
    step = Contrast()
    assert run(step, rows(2), lambda r: "bad" if "little use" in r.messages[0]["content"] else "") == []
    assert step.desk.reasons == ["empty answer"] * 2  # type: ignore[attr-defined]
    assert len(step.desk.asked) == 2  # type: ignore[attr-defined]


# ------------------------------------------------------------------------------------------------------ expand


def listed(request: Request) -> str:
    return "\n".join(f"{i}. {words(f'{request.seed} {i}')}" for i in (1, 2, 3, 4))


def test_expand_writes_as_many_as_are_wanted() -> None:
    step = Expand(count=21, wave=3)
    made = run(step, rows(10), listed)
    assert len(made) == 21
    assert len({row.prompt for row in made}) == 21
    assert len(step.desk.asked) == 6  # type: ignore[attr-defined]
    assert all(row.response is None and len(row.meta["parents"]) == 8 for row in made)
    assert {(row.meta["source"], row.meta["license"]) for row in made} == {("seeds", "CC0-1.0")}


def test_seeds_stay_where_they_are_kept_and_rows_that_pass_are_no_seeds() -> None:
    given = rows(6)
    step = Expand(count=2, demos=3, keep_seeds=True, only="meta.id < 3")
    made = run(step, given, listed)
    assert made[:6] == given
    assert len(made) == 8
    shown = step.desk.asked[0][1].messages[-1]["content"]  # type: ignore[attr-defined]
    assert sum(f"question {i}" in shown for i in range(3)) == 3
    assert sum(f"question {i}" in shown for i in range(3, 6)) == 0


def test_the_pool_grows_between_waves_only() -> None:
    """In each wave, demos come of what was written before it; so what comes first within it does not matter."""
    step = Expand(count=40, demos=4, generated_demos=2, wave=3)
    made = run(step, rows(5), listed)
    order = {row.prompt: i for i, row in enumerate(made)}
    asked = [request.messages[-1]["content"] for _, request in step.desk.asked]  # type: ignore[attr-defined]
    for number, text in enumerate(asked):
        shown = [place for prompt, place in order.items() if prompt and prompt in text]
        assert len(shown) == (0 if number < 3 else 2)
        assert all(place < 12 * (number // 3) for place in shown)


def test_prompts_like_others_are_set_aside_and_a_barren_step_ends() -> None:
    step = Expand(count=10, wave=2, generated_demos=0)
    same = "1. Sort these words by their length: harbour, tea, umbrella.\n2. Sort these words by length: harbour, tea."
    made = run(step, rows(3), lambda _: same)
    assert len(made) == 1
    assert set(step.desk.reasons) == {"too similar"}  # type: ignore[attr-defined]
    assert len(step.desk.asked) == 2 * 4  # type: ignore[attr-defined]
    assert len(run(Expand(count=10, max_similarity=None, max_calls=3), rows(3), lambda _: same)) == 6


def test_a_plan_of_expand_counts_its_calls() -> None:
    step = Expand(count=100)
    assert len(run(step, rows(10), rehearsal=True)) == 100
    assert len(step.desk.asked) == 25  # type: ignore[attr-defined]


def test_topics_are_drawn_and_noted() -> None:
    step = Expand(prompt="expand/topics", count=8, topics=["tides", "bread"], wave=1)
    made = run(step, rows(3), listed)
    assert {row.meta["topic"] for row in made} <= {"tides", "bread"}
    assert "this topic: " in step.desk.asked[0][1].messages[-1]["content"]  # type: ignore[attr-defined]


def test_rows_may_be_expanded_with_their_answers() -> None:
    say = tagged("prompt", "response")
    step = Expand(prompt="expand/rows", count=3)
    made = run(step, rows(4, response="positive"), lambda r: f"<row>{say(r)[0]}</row>")
    assert [row.kind for row in made] == ["response"] * 3


@pytest.mark.parametrize(
    ("settings", "message"), [({"count": 0}, "count is 0"), ({"demos": 2, "generated_demos": 3}, "0 to 2")]
)
def test_settings_of_expand_that_cannot_be_are_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Expand(**settings)


# ------------------------------------------------------------------------------------------------------ evolve


@pytest.mark.parametrize(("keep", "count"), [("all", 4 * 3), ("last", 4)])
def test_rounds_go_on_from_the_newest_version(keep: Any, count: int) -> None:
    given = rows(4)
    made = run(Evolve(rounds=2, keep=keep), given, tagged("task"))
    assert len(made) == count
    if keep == "all":
        for i in range(4):
            first, second, third = made[3 * i : 3 * i + 3]
            assert first == given[i]
            assert second.meta["parents"] == [content_key(first)]
            assert third.meta["parents"] == [content_key(second)]
            assert (second.meta["round"], third.meta["round"]) == (1, 2)
            assert second.meta["root"] == third.meta["root"] == content_key(first)
            assert len(third.meta["written"]) == 2
            assert third.response is None


def test_what_did_not_evolve_is_set_aside_and_the_next_round_goes_on_before_it() -> None:
    def say(request: Request) -> str:
        return "<task>Question  0</task>" if say.calls.append(1) or len(say.calls) == 1 else "<task>new</task>"

    say.calls = []  # type: ignore[attr-defined]
    step = Evolve(rounds=2)
    made = run(step, rows(1), say)
    assert [row.prompt for row in made] == ["question 0", "new"]
    assert step.desk.reasons == ["not evolved"]  # type: ignore[attr-defined]
    assert made[1].meta["parents"] == [content_key(made[0])]


def test_a_fused_prompt_has_two_parents_and_one_row_alone_cannot_be_fused() -> None:
    step = Evolve(operators=["evolve/fuse"], keep="last")
    made = run(step, rows(4), tagged("task"))
    assert [len(row.meta["parents"]) for row in made] == [2] * 4
    step = Evolve(operators=["evolve/fuse"])
    assert len(run(step, rows(1), tagged("task"))) == 1
    assert step.desk.reasons == ["no other row"]  # type: ignore[attr-defined]


def test_operators_are_drawn_by_the_row_and_not_by_its_place() -> None:
    made = {row.meta["root"]: row.meta["operator"] for row in run(Evolve(keep="last"), rows(40), tagged("task"))}
    again = {row.meta["root"]: row.meta["operator"] for row in run(Evolve(keep="last"), rows(40)[::-1], tagged("task"))}
    assert made == again
    assert len(set(made.values())) == 5


# ----------------------------------------------------------------------------------------------------- reshape


def test_a_row_becomes_a_row_per_task() -> None:
    step = Reshape(
        rows=[
            {"prompt": "[label] {{ prompt }}", "response": "{{ response }}", "meta.task": "label"},
            {"prompt": "[rationale] {{ prompt }}", "response": "{{ meta.rationale }}", "weight": "0.5"},
        ],
        drop=["meta.rationale"],
    )
    given = [Example(prompt="q", response="yes", meta={**SEED, "rationale": "because", "triples": [["a", "b", "c"]]})]
    label, rationale = run(step, given)
    assert (label.prompt, label.response, label.meta["task"], label.weight) == ("[label] q", "yes", "label", 1.0)
    assert (rationale.prompt, rationale.response, rationale.weight) == ("[rationale] q", "because", 0.5)
    assert "rationale" not in label.meta
    assert label.meta["triples"] == [["a", "b", "c"]]
    assert label.meta["license"] == "CC0-1.0"


def test_values_and_chats_keep_their_kind() -> None:
    chat: Any = [{"role": "user", "content": "{{ prompt }}"}, {"role": "assistant", "content": "{{ response }}"}]
    shape = {
        "messages": chat,
        "prompt": None,
        "response": None,
        "meta.copy": "{{ meta.list }}",
        "score": "{{ meta.x }}",
    }
    (made,) = run(Reshape(rows=[shape]), [Example(prompt="q", response="a", meta={"list": [1, 2], "x": 2})])
    assert made.messages == [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert (made.meta["copy"], made.score, made.kind) == ([1, 2], 2.0, "messages")


def test_groups_stay_together_when_each_row_becomes_several() -> None:
    given = [Example(prompt="q", response=f"a{i}", group=f"g{i // 2}") for i in range(4)]
    made = run(Reshape(rows=[{"meta.n": "1"}, {"meta.n": "2"}]), given)
    seen = [row.group for row in made]
    assert seen == ["g0", "g0", "g0/1", "g0/1", "g1", "g1", "g1/1", "g1/1"]


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ({"text": "{{ prompt }}"}, "no form"),
        ({"prompt": None, "response": None}, "no form"),
        ({"response": "{{ meta.none }}"}, "lacks a field"),
        ({"score": "{{ prompt }}"}, "no number"),
    ],
)
def test_a_shape_that_no_reader_takes_is_set_aside(shape: dict[str, Any], reason: str) -> None:
    step = Reshape(rows=[shape])
    assert run(step, [Example(prompt="q", response="a")]) == []
    assert step.desk.reasons == [reason]  # type: ignore[attr-defined]


def test_wrong_fields_of_reshape_are_config_errors() -> None:
    for rows_, message in (
        ([], "rows is empty"),
        ([{"promt": "x"}], r"rows\[0\]\.promt: a row has no promt"),
        ([{"prompt": "{{ meta_x }}"}], r"rows\[0\]\.prompt names meta_x"),
        ([{"messages": "hello"}], "give a list of role and content"),
    ):
        with pytest.raises(ConfigError, match=message):
            Reshape(rows=rows_)


# ------------------------------------------------------------------------------------------------- all of them

STEPS = {
    "label": (lambda: Label(n=2), echo, {}),
    "curate": (Curate, tagged("question", "answer"), {}),
    "rewrite": (Rewrite, tagged("paraphrase"), {}),
    "contrast": (Contrast, lambda r: words(str(r.messages)), {}),
    "evolve": (lambda: Evolve(rounds=2), tagged("task"), {}),
}


@pytest.mark.parametrize("name", STEPS)
def test_what_is_written_about_a_row_does_not_depend_on_the_rows_before_it(name: str) -> None:
    make, say, _ = STEPS[name]
    given = rows(12)
    first = run(make(), given, say)
    shuffled = given[:]
    random.Random(0).shuffle(shuffled)
    assert sorted(map(content_key, run(make(), shuffled, say))) == sorted(map(content_key, first))


@pytest.mark.parametrize("name", STEPS)
def test_equal_rows_are_one_question(name: str) -> None:
    """Equal requests are one call of the desk, so a doubled row costs nothing."""
    make, say, _ = STEPS[name]
    once, twice = make(), make()
    run(once, rows(3), say)
    run(twice, [row for row in rows(3) for _ in range(2)], say)
    assert len({repr(ask) for ask in twice.desk.asked}) == len({repr(ask) for ask in once.desk.asked})  # type: ignore[attr-defined]


def test_a_child_remembers_all_who_wrote_in_it() -> None:
    """Terms of a teacher hold for what is made of its words."""
    given = [Example(prompt=f"p{i}", meta={"written": [{"by": "a"}], "license": one}) for i, one in enumerate("MA")]
    step = Expand(count=1)
    step.open(FakeDesk(listed))
    (made,) = list(step(given))
    assert [entry["by"] for entry in made.meta["written"]] == ["a", "teacher"]
    assert made.meta["license"] == ["A", "M"]
