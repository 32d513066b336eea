"""A row is an example, or a sentence that says where it is bad and what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcli.api import Example
from kdcli.errors import ConfigError, DataError
from kdcli.store.examples import BadRow, BadRows, content_key, parse_example, parse_line, read_examples

ASSISTANT = {"role": "assistant", "content": "b"}


def rows_of(path: Path, **settings: Any) -> list[Example]:
    return list(read_examples(path, domain="code", **settings))


@pytest.mark.parametrize(
    ("line", "reason", "sentence"),
    [
        (b"", "empty line", "delete it"),
        (b'{"text": "a"', "broken JSON", "column 13"),
        (b'{"text": "a"} {"text": "b"}', "broken JSON", "one JSON object a line"),
        (b'{"text": "\xff"}', "not UTF-8", "byte 11"),
        (b'["a"]', "not an object", "not a list"),
        (b'{"text": "a", "text": "b"}', "duplicate key", "text stands twice"),
        (b'{"text": "a", "score": NaN}', "broken JSON", "NaN is no JSON"),
        (b"[" * 100_000, "broken JSON", "nested too deeply"),
        (b'{"id": ' + b"9" * 5000 + b', "text": "a"}', "broken JSON", "digits"),
        (b'{"text": ""}', "empty text", "text is empty"),
        (b'{"text": " \\n"}', "empty text", "text is empty"),
        (b'{"text": 7}', "wrong type", "text must be text, not a number"),
        (b'{"text": "a\\u0000b"}', "NUL character", "at 2"),
        (b'{"text": "a\\ud800"}', "lone surrogate", "at 2"),
        (b'{"text": null}', "no content", "none of text, messages"),
        (b'{"promt": "a", "response": "b"}', "no prompt", "no prompt"),
        (b'{"body": "a"}', "no content", "its columns are body"),
        (b'{"Text": "a"}', "no content", "data.columns.text=Text"),
        (b'{"prompt": "a"}', "no response", "add `response`"),
        (b'{"prompt": "a", "response": ""}', "empty response", "response is empty"),
        (b'{"prompt": "a", "chosen": "b"}', "no rejected", "no rejected"),
        (b'{"text": "a", "prompt": "b", "response": "c"}', "ambiguous", "data.columns.text=text"),
        (b'{"text": "a", "prompt": "b"}', "ambiguous", "both text and prompt"),
        (b'{"prompt": "a", "response": "b", "chosen": "c", "rejected": "d"}', "ambiguous", "both response and chosen"),
        (b'{"messages": []}', "wrong type", "not empty"),
        (b'{"messages": "hi"}', "wrong type", "not text"),
        (b'{"messages": [{"role": "assistant"}]}', "wrong type", "messages[0] must be an object"),
        (b'{"messages": [{"role": "assistant", "content": ["b"]}]}', "wrong type", "messages[0].content must be text"),
        (b'{"messages": [{"role": "assistant", "content": ""}]}', "empty content", "messages[0].content is empty"),
        (b'{"messages": [{"role": "user", "content": "a"}]}', "no response", "no turn with role assistant"),
        (b'{"text": "a", "domain": 1.5}', "wrong type", "domain must be a word"),
        (b'{"text": "a", "weight": -1}', "bad number", "weight is -1; give a finite number of at least 0"),
        (b'{"text": "a", "weight": true}', "wrong type", "weight must be a number, not true or false"),
        (b'{"text": "a", "score": 1e999}', "bad number", "score is inf"),
        (b'{"text": "a", "meta": "x"}', "wrong type", "meta must be an object"),
        (b'{"text": "a", "teacher_prompt": "b"}', "teacher_prompt", "give it with prompt + response"),
        (b'{"prompt": "a", "response": "b", "teacher_prompt": 7}', "wrong type", "teacher_prompt must be text"),
    ],
)
def test_a_bad_row_has_a_reason_and_is_named_by_file_and_line(
    tmp_path: Path, line: bytes, reason: str, sentence: str
) -> None:
    with pytest.raises(BadRow) as bad:
        parse_example(parse_line(line))
    assert bad.value.reason == reason
    assert sentence in str(bad.value)

    file = tmp_path / "code.jsonl"
    file.write_bytes(b'{"text": "fine"}\n' + line + b'\n{"text": "fine"}\n')
    with pytest.raises(ConfigError) as refused:
        rows_of(file)
    assert str(refused.value).startswith(f"{file}:2: ")
    assert sentence in str(refused.value)


TEXT = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\x00"), min_size=1).filter(str.strip)
EXAMPLES = st.one_of(
    st.fixed_dictionaries({"text": TEXT}),
    st.fixed_dictionaries({"prompt": st.just("") | TEXT, "response": TEXT}),
    st.fixed_dictionaries({"prompt": TEXT, "chosen": TEXT, "rejected": TEXT}),
    st.fixed_dictionaries(
        {
            "messages": st.tuples(TEXT, TEXT).map(
                lambda t: [{"role": "user", "content": t[0]}, {**ASSISTANT, "content": t[1]}]
            )
        }
    ),
)
EXTRAS = st.fixed_dictionaries(
    {},
    optional={
        "domain": st.sampled_from(["code", "prose"]),
        "group": TEXT,
        "score": st.floats(-9, 9),
        "weight": st.floats(0, 9),
        "id": TEXT,
        "source": st.integers(),
    },
)


@given(content=EXAMPLES, extras=EXTRAS)
def test_what_is_written_is_read(content: dict[str, Any], extras: dict[str, Any]) -> None:
    example = parse_example(parse_line(json.dumps({**content, **extras}).encode()))
    for name, value in {**content, **extras}.items():
        found = example.meta[name] if name in ("id", "source") else getattr(example, name)
        assert found == value
    assert set(example.meta) <= {"id", "source"}


@given(content=EXAMPLES, extras=EXTRAS)
def test_the_key_is_of_the_content_alone(content: dict[str, Any], extras: dict[str, Any]) -> None:
    plain, with_extras = parse_example(content), parse_example({**content, **extras})
    assert content_key(plain) == content_key(with_extras)
    assert content_key(plain) != content_key(parse_example({"prompt": "p", "response": json.dumps(content)}))


def test_columns_rename_and_say_what_the_content_is() -> None:
    row = {"question": "a", "answer": "b", "text": "c", "prompt": None, "id": 4}
    example = parse_example(row, columns={"prompt": "question", "response": "answer"})
    assert (example.prompt, example.response, example.text) == ("a", "b", None)
    assert example.meta == {"text_column": "c", "id": 4}


def test_a_missing_column_lists_the_columns_there_are(tmp_path: Path) -> None:
    file = tmp_path / "code.jsonl"
    file.write_text('{"question": "a", "answer": "b"}\n')
    with pytest.raises(
        ConfigError, match=r"code.jsonl:1: there is no column questoin; .*question, answer; did you mean question"
    ):
        rows_of(file, columns={"prompt": "questoin", "response": "answer"}, bad=BadRows(0.5))


def test_empty_lines_at_the_end_and_a_byte_order_mark_are_no_rows(tmp_path: Path) -> None:
    file = tmp_path / "code.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n{"text": "b"}\n\n \n')
    assert [(example.text, example.where) for example in rows_of(file)] == [("a", f"{file}:1"), ("b", f"{file}:2")]


def test_all_bad_rows_up_to_five_are_named_at_once(tmp_path: Path) -> None:
    file = tmp_path / "code.jsonl"
    file.write_text('{"text": "a"}\n' + "{\n" * 9)
    with pytest.raises(ConfigError) as refused:
        rows_of(file)
    assert [problem.split(": ")[0] for problem in refused.value.problems[:-1]] == [f"{file}:{n}" for n in range(2, 7)]
    assert "max_bad_fraction" in refused.value.problems[-1]


def test_bad_rows_are_dropped_up_to_the_fraction_that_is_allowed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "code.jsonl"
    file.write_text('{"text": "a"}\n{\n{"text": "b"}\n{"prompt": "c"}\n')
    bad = BadRows(0.5)
    assert [example.text for example in rows_of(file, bad=bad)] == ["a", "b"]
    assert bad.reasons == {f"{file}:2": "broken JSON", f"{file}:4": "no response"}
    assert "2 of 4 rows are bad (1 broken JSON, 1 no response) and were dropped" in caplog.text
    with pytest.raises(DataError, match=r"2 of 4 rows are bad .* more than data.max_bad_fraction=0.49"):
        rows_of(file, bad=BadRows(0.49))


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 7])
def test_a_fraction_is_a_share(fraction: float) -> None:
    with pytest.raises(ConfigError, match="max_bad_fraction"):
        BadRows(fraction)


def test_a_missing_file_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere.jsonl: cannot be read \(No such file"):
        rows_of(tmp_path / "nowhere.jsonl")
