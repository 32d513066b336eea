"""Rules: each names the first that is broken; what keeps all of them passes unchanged."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from kdcli.api import Example
from kdcli.augmentation.rules import Rules, refuses, repeated
from kdcli.errors import ConfigError
from tests.desks import FakeDesk, run

ROW = Example(prompt="What is a tide?", response="The rise and fall of the sea, twice a day.")
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}


def reasons(row: Example, **settings: Any) -> list[str]:
    step = Rules(**settings)
    kept = run(step, [row])
    assert isinstance(step.desk, FakeDesk)
    assert kept == ([] if step.desk.set_aside else [row])
    return step.desk.reasons


@pytest.mark.parametrize(
    ("settings", "response", "reason"),
    [
        (dict(min_chars=5), "four", "too short"),
        (dict(max_chars=3), "four", "too long"),
        (dict(min_words=3), "two words", "too short"),
        (dict(max_words=1), "two words", "too long"),
        (dict(must_match=[r"\d"]), "no digit", "does not match"),
        (dict(must_not_match=[r"(?i)http"]), "see HTTP://x", "matches"),
        (dict(same_as_prompt=True), "what is a TIDE", "same as prompt"),
        (dict(repeats=0.5), "go on and on and on and on and on", "repeats itself"),
        (dict(schema=SCHEMA), "n = 1", "no JSON"),
        (dict(schema=SCHEMA), '{"n": "1"}', "breaks the schema"),
        (dict(language="en"), "Ebbe und Flut folgen dem Mond um die Erde herum.", "other language"),
        (dict(), "I'm sorry, but I can't help with that.", "refusal"),
    ],
)
def test_a_broken_rule_is_named_and_kept_rules_let_pass(settings: dict[str, Any], response: str, reason: str) -> None:
    broken = Example(prompt=ROW.prompt, response=response)
    assert reasons(broken, **settings) == [reason]
    fits = Example(prompt=ROW.prompt, response='```json\n{"n": 1}\n```') if "schema" in settings else ROW
    lengths = {"max_chars": 60, "max_words": 12}
    wider = {k: lengths.get(k, v) for k, v in settings.items()} | (
        {"must_match": ["sea"]} if "must_match" in settings else {}
    )
    assert reasons(fits, **wider) == []


def test_bounds_are_within() -> None:
    assert reasons(ROW, min_chars=42, max_chars=42, min_words=10, max_words=10) == []


@pytest.mark.parametrize(
    "answer",
    [
        "I cannot assist with this request.",
        "I’m unable to provide that information, since it could be misused.",
        "As an AI language model, I have no opinions about this.",
        "Unfortunately, I won't be able to do this. I am not able to generate such content.",
        "I must respectfully decline to answer.",
        "Sorry, I am not able to help here.",
        "That is not something I can help with.",
        "We are very sorry, but it is not possible to share this.",
    ],
)
def test_refusals_are_known(answer: str) -> None:
    assert refuses(answer)


@pytest.mark.parametrize(
    "answer",
    [
        "The plane cannot land in fog, so the pilot must decline the approach.",
        "A language model is trained to predict the next word.",
        "You can't assist a witness in lying; that is a crime.",
        "He said: sorry for being late. Then we answered the question.",
        "Here is the letter. " + "It goes on. " * 30 + "I'm sorry, but I can't help with that.",
    ],
)
def test_answers_that_speak_of_refusing_are_none(answer: str) -> None:
    assert not refuses(answer)


def test_repetition_by_hand() -> None:
    """a b c a b c: trigrams abc, bca, cab, abc, of which one is a repeat."""
    assert repeated("a b c a b c") == 0.25
    assert repeated("a b") == 0.0


def test_language_is_not_guessed_of_a_word() -> None:
    assert reasons(Example(prompt="x", response="Ja."), language="en") == []
    assert reasons(Example(prompt="x", response="Ebbe und Flut folgen dem Mond."), language=["en", "de"]) == []


def test_answers_of_a_group_leave_alone() -> None:
    rows = [Example(prompt="x", response=r, group="g") for r in ("fine", "I can't help with that", "good")]
    assert [row.response for row in run(Rules(), rows)] == ["fine", "good"]


def test_a_rehearsal_keeps_all() -> None:
    assert run(Rules(min_chars=99), [ROW], rehearsal=True) == [ROW]


def test_a_chat_s_last_answer_is_looked_at() -> None:
    turns = [("user", "hi"), ("assistant", "hello there, friend"), ("user", "bye"), ("assistant", "bye")]
    chat = Example(messages=[{"role": role, "content": content} for role, content in turns])
    assert reasons(chat, min_words=2) == ["too short"]
    assert reasons(Example(text="no answer here")) == ["lacks a field"]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (dict(must_match=["("]), "no regular expression"),
        (dict(min_words=3, max_words=2), "swap"),
        (dict(repeats=2.0), "share from 0 to 1"),
        (dict(language="english"), "codes such as en"),
        (dict(schema={"type": 3}), "no JSON schema"),
    ],
)
def test_bad_settings_name_the_way_out(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        run(Rules(**settings), [ROW])


@pytest.mark.parametrize(("package", "settings"), [("py3langid", dict(language="en")), ("jsonschema", dict(schema={}))])
def test_a_missing_package_names_the_extra(package: str, settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=r"kdcli\[augment\]"):
        run(Rules(**settings), [ROW])
