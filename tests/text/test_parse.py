"""Reading answers: what is declared comes out, anything else is a BadRow, and what a form allows parses."""

from __future__ import annotations

import contextlib
import re
import time
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kdcli.errors import ConfigError
from kdcli.store.examples import BadRow
from kdcli.text.parse import Parser

SCHEMA = {
    "type": "object",
    "properties": {"prompt": {"type": "string"}, "score": {"type": "number", "minimum": 1, "maximum": 5}},
    "required": ["prompt"],
}
MANY = {"type": "object", "properties": {"rows": {"type": "array", "items": SCHEMA, "minItems": 1}}}
MANY["required"] = ["rows"]
KINDS: dict[str, dict[str, Any]] = {
    "text": {"kind": "text"},
    "regex": {
        "kind": "regex",
        "pattern": r"Q: (?P<prompt>.+?)\nA: (?P<response>[^\n]+)",
        "form": "Q: a\nA: [a-z]{1,9}",
    },
    "regex_many": {"kind": "regex", "pattern": r"(?P<score>\S+);", "many": True, "numbers": {"score": [0, 9]}},
    "xml": {"kind": "xml", "tags": ["prompt", "response"]},
    "xml_held": {"kind": "xml", "tags": {"why": "reason", "s": "score", "v": "verdict"}, "optional": ["why"]}
    | {"numbers": {"score": [1, 10]}, "choices": {"verdict": ["A", "B", "tie"]}},
    "xml_each": {"kind": "xml", "tags": ["prompt"], "each": "task", "at_most": 3},
    "json": {"kind": "json", "schema": SCHEMA},
    "json_each": {"kind": "json", "schema": MANY, "each": "rows"},
    "lines": {"kind": "lines", "at_least": 2},
    "choice": {"kind": "choice", "field": "label", "options": ["yes", "no", "not sure"]},
    "number": {"kind": "number", "minimum": 0, "maximum": 10, "after": "Score:"},
    "number_alone": {"kind": "number", "minimum": 0, "maximum": 1},
    "code": {"kind": "code", "language": "python"},
}
PIECES = (
    *("<prompt>", "</prompt>", "<response>", "</response>", "<task>", "</task>", "<s>", "</s>", "<v>", "</v>", "```"),
    *('{"prompt": ', '"x"', '"score": 3', "}", "[", "]", ", ", '{"rows": [', "NaN", "1e999", '"\\ud800"', '"\\u0000"'),
    *("1. ", "- ", "\n", " ", "Q: ", "A: ", "Score: ", "-", "7", "9" * 400, ".5", "yes", "tie", "é", "\x00", "\ud800"),
)
ANSWERS = st.one_of(st.text(), st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=4))).map("".join))


def parser(name: str) -> Parser:
    return Parser(KINDS[name], where="here")


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=60, deadline=None)
@given(text=ANSWERS)
def test_any_text_gives_records_or_a_bad_row(name: str, text: str) -> None:
    try:
        records = parser(name)(text)
    except BadRow:
        return
    assert records
    for record in records:
        assert set(record) <= {*parser(name).fields, "value"} or KINDS[name]["kind"] == "json"
        assert all(value.strip() for key, value in record.items() if key in ("prompt", "response"))
        assert all("\x00" not in str(value) for value in record.values())
        for key, (low, high) in parser(name).bounds.items():
            assert key not in record or low <= record[key] <= high


@pytest.mark.parametrize("name", [name for name in KINDS if "regex" in (parser(name).form() or {})])
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_what_a_form_allows_parses(name: str, data: Any) -> None:
    """A writer that is held to the form cannot write what is set aside, but for text that no row may have."""
    form = parser(name).form()
    assert form is not None
    text = data.draw(st.from_regex(form["regex"], fullmatch=True))
    try:
        assert parser(name)(text)
    except BadRow as error:
        outcome = error.reason
    else:
        outcome = "broken text"
    assert outcome == "broken text" or any(not one.isprintable() for one in text), text


@pytest.mark.parametrize("name", [name for name in KINDS if KINDS[name]["kind"] != "regex"])
def test_deep_long_and_repeated_texts_are_read_in_no_time(name: str) -> None:
    """Linear time; a prompt's own pattern is as fast as its author made it."""
    read = parser(name)
    began = time.process_time()
    for piece in (
        "<prompt>",
        "<task><prompt>",
        "[",
        '{"prompt": ',
        "1. a  ",
        "- ",
        "\n",
        " ",
        "```\n",
        "9",
        "yes ",
        "Score:",
    ):
        with contextlib.suppress(BadRow):
            read(piece * (150_000 // len(piece)) + "x")
    assert time.process_time() - began < 5


@pytest.mark.parametrize(
    ("name", "text", "records"),
    [
        ("text", " hello \n", [{"response": "hello"}]),
        ("regex", "Q: one\nA: 1\nQ: two\nA: 2", [{"prompt": "one", "response": "1"}]),
        ("regex_many", "1; 2.5;", [{"score": 1.0}, {"score": 2.5}]),
        (
            "xml",
            "Sure! <prompt>a < b</prompt> <response>\n<b>x</b>\n</response>",
            [{"prompt": "a < b", "response": "<b>x</b>"}],
        ),
        ("xml_held", "<s>Rating: 7 of 10</s><v> a. </v>", [{"score": 7.0, "verdict": "A"}]),
        (
            "xml_each",
            "<task><prompt>a</prompt></task><task><prompt>b</prompt></task>",
            [{"prompt": "a"}, {"prompt": "b"}],
        ),
        ("xml_each", "<task><prompt>a</prompt></task>" * 5, [{"prompt": "a"}] * 3),
        ("json", 'See [1]: {"prompt": "a", "score": 3} so', [{"prompt": "a", "score": 3}]),
        ("json", '```json\n{"prompt": "a"}\n```', [{"prompt": "a"}]),
        ("json_each", '{"rows": [{"prompt": "a"}, {"prompt": "b"}]}', [{"prompt": "a"}, {"prompt": "b"}]),
        (
            "lines",
            "Here:\n1. one\n 2) two \n* three\n4.\nend",
            [{"prompt": "one"}, {"prompt": "two"}, {"prompt": "three"}],
        ),
        ("choice", "At first yes, but now: not sure.", [{"label": "not sure"}]),
        ("number", "2 reasons.\nScore: 8.5/10", [{"score": 8.5}]),
        ("number_alone", "0.25", [{"score": 0.25}]),
        ("code", "```python\nx = 1\n```\nor\n```python\n  y = 2\n```", [{"response": "  y = 2"}]),
    ],
)
def test_answers_are_read(name: str, text: str, records: list[dict[str, Any]]) -> None:
    assert parser(name)(text) == records


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("text", " \n", "empty answer"),
        ("text", "x" * 200_001, "answer too long"),
        ("text", "a\ud800", "broken text"),
        ("regex", "nothing", "no match"),
        ("xml", "<prompt>a</prompt>", "missing tag"),
        ("xml", "<prompt> </prompt><response>b</response>", "missing tag"),
        ("xml", "<prompt>cut off", "missing tag"),
        ("xml_held", "<s>11</s><v>A</v>", "number out of range"),
        ("xml_held", "<s>many</s><v>A</v>", "no number"),
        ("xml_held", "<s>1</s><v>C</v>", "no choice"),
        ("json", '{"prompt": "a"', "broken JSON"),
        ("json", '{"prompt": 1}', "wrong JSON"),
        ("json", '{"prompt": " "}', "no prompt"),
        ("json", '{"prompt": "a", "score": NaN}', "broken JSON"),
        ("json", "[" * 100_000, "broken JSON"),
        ("lines", "1. one", "too few lines"),
        ("choice", "perhaps", "no choice"),
        ("number", "8", "no number"),
        ("number", "Score: 11", "number out of range"),
        ("code", "no fence", "no code"),
    ],
)
def test_answers_of_no_use_have_a_reason(name: str, text: str, reason: str) -> None:
    with pytest.raises(BadRow) as caught:
        parser(name)(text)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"kind": "csv"}, "choose one of"),
        ("text", "choose one of"),
        ({"kind": "text", "filed": "x"}, r"parse\.filed: text has field"),
        ({"kind": "xml"}, r"parse\.tags: must be given"),
        ({"kind": "xml", "tags": []}, "there is no field"),
        ({"kind": "xml", "tags": ["a"], "numbers": {"b": [0, 1]}}, "there is no field b"),
        ({"kind": "regex", "pattern": "("}, "error"),
        ({"kind": "regex", "pattern": "abc"}, "there is no field"),
        ({"kind": "json", "schema": {"type": "objekt"}}, "SchemaError"),
        ({"kind": "json", "schema": {"$ref": "http://127.0.0.1/schema"}}, "leads out of the schema"),
        ({"kind": "json", "schema": SCHEMA, "each": "rows"}, "KeyError"),
        ({"kind": "choice", "field": "x", "options": []}, "options are empty"),
        ({"kind": "number", "minimum": 2, "maximum": 1}, "minimum lies above"),
    ],
)
def test_a_wrong_declaration_is_a_config_error_that_says_where(content: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        Parser(content, where="a.yaml: parse")
    assert "a.yaml: parse" in str(caught.value)


def test_no_form_ends_a_text() -> None:
    """What ended there would look whole."""
    for name in KINDS:
        form = parser(name).form()
        if form and "regex" in form:
            assert not re.search(r"\]\{\d*,\d{3,}\}|\)\{\d*,\d{3,}\}", form["regex"]), form
        if form and "json" in form:
            assert form["json"] == KINDS[name]["schema"]


@pytest.mark.parametrize("name", [name for name in KINDS if parser(name).form()])
def test_constrained_decoding_takes_every_form(name: str) -> None:
    llguidance = pytest.importorskip("llguidance")
    form = parser(name).form()
    assert form is not None
    if "json" in form:
        grammar = llguidance.LLMatcher.grammar_from_json_schema(form["json"])
    else:
        grammar = llguidance.LLMatcher.grammar_from_regex(form["regex"])
    assert llguidance.LLMatcher.validate_grammar(grammar) == ""
