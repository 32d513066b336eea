"""What augmentation may begin with and training may not; and rows that come back as they were written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcli.api import Data, Example
from kdcli.data.hub import Hub
from kdcli.data.jsonl import Jsonl
from kdcli.data.mixture import Mixture
from kdcli.errors import ConfigError, KDError
from kdcli.store.examples import content_key, dump_example, load_example, parse_example, parse_line

UNFINISHED: list[dict[str, Any]] = [
    {"prompt": "why?"},
    {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "why?"}]},
    {"topic": "tides", "document": "d"},
    {"meta": {"topic": "tides"}},
]
BROKEN: list[dict[str, Any]] = [
    {},
    {"domain": "math", "weight": 2.0},
    {"response": "no prompt"},
    {"prompt": "p", "chosen": "c"},
    {"teacher_prompt": "alone"},
    {"prompt": "p", "text": "t"},
    {"prompt": 3},
    {"messages": []},
]


def written(folder: Path, *rows: dict[str, Any]) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "seeds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def sources(path: str) -> list[Data]:
    return [Jsonl(path=path), Hub(path=path), Mixture(domains={"seeds": Jsonl(path=path)})]


@pytest.mark.parametrize("row", UNFINISHED)
def test_seeds_may_be_unfinished_and_rows_to_train_on_may_not(tmp_path: Path, row: dict[str, Any]) -> None:
    for data in sources(written(tmp_path / "seeds", row)):
        (seed,) = (example for rows in data.seeds().values() for example in rows)
        assert seed.domain == "seeds" and seed.response is None
        expected = {key: value for key, value in row.items() if key in ("topic", "document")} or row.get("meta", {})
        assert seed.meta == expected
        with pytest.raises(ConfigError, match=r"no response|no turn|none of text|no content"):
            [list(rows) for rows in data.domains().values()]


def test_seeds_that_say_nothing_yet_differ_by_their_columns() -> None:
    one, other = (parse_example({"topic": topic}, unfinished=True) for topic in ("tides", "moons"))
    assert content_key(one) != content_key(other)


@pytest.mark.parametrize("row", BROKEN)
def test_broken_seeds_are_refused_by_line(tmp_path: Path, row: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"seeds\.jsonl:1"):
        [list(rows) for rows in Jsonl(path=written(tmp_path, row)).seeds().values()]


@pytest.mark.parametrize(
    "row", [{"text": "t"}, {"prompt": "p", "response": "r", "id": 3}, {"prompt": "p", "chosen": "c", "rejected": "r"}]
)
def test_finished_rows_are_read_alike_by_both(tmp_path: Path, row: dict[str, Any]) -> None:
    data = Jsonl(path=written(tmp_path, row))
    assert [list(rows) for rows in data.seeds().values()] == [list(rows) for rows in data.domains().values()]


words = st.text(min_size=1, max_size=20)
values = st.recursive(st.none() | st.booleans() | st.integers() | words, lambda inner: st.lists(inner, max_size=2))


@given(
    example=st.builds(
        Example,
        prompt=words,
        response=st.none() | words,
        group=st.none() | words,
        score=st.none() | st.floats(allow_nan=False, allow_infinity=False),
        weight=st.floats(0, 10),
        meta=st.dictionaries(words, values, max_size=3),
    )
)
@settings(max_examples=50, deadline=None)
def test_a_row_comes_back_as_it_was_written(example: Example) -> None:
    line = dump_example(example)
    assert line.endswith(b"\n") and line.count(b"\n") == 1 and b": null" not in line.split(b'"meta"')[0]
    again = load_example(line, where="here")
    assert again == example and content_key(again) == content_key(example) and again.where == "here"
    assert dump_example(again) == line


def test_half_characters_and_odd_numbers_are_written_as_json() -> None:
    line = dump_example(Example(prompt="\ud83d", meta={"score": float("nan"), "path": Path("a")}))
    assert load_example(line).prompt == "\ud83d" and load_example(line).meta == {"score": None, "path": "a"}


def test_a_row_that_was_written_is_read_for_training() -> None:
    example = Example(prompt="p", response="r", domain="math", meta={"source": "s", "topic": {"a": 1}}, score=2.0)
    assert parse_example(parse_line(dump_example(example))) == example


def test_what_is_no_row_of_ours_is_told() -> None:
    for line in (b'{"other": 1}', b"{", b"[]"):
        with pytest.raises(KDError, match="no row that kdcli wrote"):
            load_example(line)
