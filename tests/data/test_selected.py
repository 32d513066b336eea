"""Rows chosen by a file of scores: which, how many, in what order, and what is refused."""

from __future__ import annotations

import json
from operator import length_hint
from pathlib import Path
from typing import Any

import pytest

from kdcli.data.jsonl import Jsonl
from kdcli.data.selected import Selected
from kdcli.errors import ConfigError
from kdcli.store.examples import content_key

# text -> (domain, tokens, student nats, teacher nats); differences per target: 2, 1, -1, 0.5, 3, 0
SCORED = {
    "a": ("code", 2, 8.0, 4.0),
    "b": ("code", 4, 8.0, 4.0),
    "c": ("code", 1, 2.0, 3.0),
    "d": ("code", 8, 9.0, 5.0),
    "e": ("prose", 1, 4.0, 1.0),
    "f": ("prose", 2, 2.0, 2.0),
}


def data(folder: Path) -> Jsonl:
    folder.mkdir(exist_ok=True)
    for name in ("code", "prose"):
        rows = [{"text": text, "score": float(ord(text))} for text, (domain, *_) in SCORED.items() if domain == name]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Jsonl(path=str(folder))


def scores(file: Path, source: Jsonl, leave_out: str = "", teacher: bool = True) -> str:
    lines = []
    for name, rows in source.domains().items():
        for example in rows:
            _, tokens, student, other = SCORED[str(example.text)]
            line = {"key": content_key(example), "domain": name, "tokens": tokens, "student": student}
            line |= {"teacher": other if teacher else None, "difference": student - other if teacher else None}
            lines += [] if example.text in leave_out and leave_out else [line]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(file)


def chosen(tmp_path: Path, **settings: Any) -> dict[str, str]:
    source = data(tmp_path / "data")
    given = settings.pop("scores", None) or scores(tmp_path / "scores.jsonl", source)
    selected = Selected(data=source, scores=given, **settings)
    parts = selected.domains()
    found = {name: "".join(str(example.text) for example in rows) for name, rows in parts.items()}
    assert found == {name: "".join(str(example.text) for example in rows) for name, rows in parts.items()}
    assert {name: length_hint(rows) for name, rows in parts.items()} == {name: len(s) for name, s in found.items()}
    return found


def test_the_largest_differences_per_target_are_kept_in_the_order_of_the_data(tmp_path: Path) -> None:
    """3 (e), 2 (a), 1 (b) of six rows; summed over the example 4 (a), 4 (b), 4 (d), ties to the earlier row."""
    assert chosen(tmp_path) == {"code": "ab", "prose": "e"}
    with pytest.raises(ConfigError, match=r"none of the rows of domain prose is kept; set data.per_domain=true"):
        chosen(tmp_path, per="example")


def test_the_share_may_be_of_each_domain(tmp_path: Path) -> None:
    assert chosen(tmp_path, per="example", per_domain=True) == {"code": "ab", "prose": "e"}
    assert chosen(tmp_path, keep=0.25, per_domain=True) == {"code": "a", "prose": "e"}


def test_everything_is_kept_with_a_share_of_one(tmp_path: Path) -> None:
    assert chosen(tmp_path, keep=1.0) == {"code": "abcd", "prose": "ef"}


@pytest.mark.parametrize(("by", "expected"), [("student", "ae"), ("teacher", "ce"), ("score", "ef")])
def test_other_columns_rank_too(tmp_path: Path, by: Any, expected: str) -> None:
    """The largest per domain. Student: 4 (a) of 4, 2, 2, 9/8 and 4 (e) of 4, 1; teacher: 3 (c) and 1 (e), a tie with
    f; the rows' own score grows with the letter."""
    found = chosen(tmp_path, by=by, keep=0.25, per_domain=True)
    if by == "score":
        assert found == {"code": "d", "prose": "f"}
    else:
        assert found["code"] + found["prose"] == expected


def test_stages_are_growing_prefixes_from_easy_to_hard(tmp_path: Path) -> None:
    """Student's nats per target: d 1.125, b 2, c 2, a 4 and f 1, e 4."""
    settings: dict[str, Any] = dict(by="student", order="smallest", keep=1.0, stages=4, per_domain=True)
    stages = [chosen(tmp_path, stage=k, **settings) for k in (1, 2, 3, 4)]
    assert [one["code"] for one in stages] == ["d", "bd", "bcd", "abcd"]
    assert [one["prose"] for one in stages] == ["f", "f", "ef", "ef"]


def test_several_columns_are_fused_by_their_ranks(tmp_path: Path) -> None:
    """By [student, score], largest first, ranks are a 1, 6; b 3, 5; c 4, 4; d 5, 3; e 2, 2; f 6, 1, so that e has
    2/62 = 0.0323, a and f 1/61 + 1/66 = 0.0315, b and d 1/63 + 1/65 = 0.031258, c 2/64 = 0.03125."""
    assert chosen(tmp_path, by=["student", "score"], keep=4 / 6) == {"code": "ab", "prose": "ef"}
    assert chosen(tmp_path, by=["student", "score"], keep=5 / 6) == {"code": "abd", "prose": "ef"}


def test_equal_rows_stay_together(tmp_path: Path) -> None:
    source = data(tmp_path / "data")
    with (tmp_path / "data/code.jsonl").open("a") as file:
        file.write(json.dumps({"text": "a", "score": 1.0}) + "\n")
    given = scores(tmp_path / "scores.jsonl", Jsonl(path=str(tmp_path / "data")))
    selected = Selected(data=source, scores=given, keep=0.25, per_domain=True)
    assert [example.text for example in selected.domains()["code"]] == ["a", "a"]


def test_the_fingerprint_covers_rows_scores_and_settings(tmp_path: Path) -> None:
    source = data(tmp_path / "data")
    file = tmp_path / "scores.jsonl"
    given = scores(file, source)
    first = Selected(data=source, scores=given).fingerprint()
    elsewhere = scores(tmp_path / "other.jsonl", source)
    assert Selected(data=source, scores=elsewhere).fingerprint() == first
    changed = [
        Selected(data=source, scores=given, keep=0.6),
        Selected(data=source, scores=given, by="student"),
        Selected(data=source, scores=given, stages=2, stage=2),
        Selected(data=Jsonl(path=str(tmp_path / "data"), limit=1), scores=given),
    ]
    file.write_text(file.read_text().replace("8.0", "7.0"))
    prints = [first, *(one.fingerprint() for one in changed), Selected(data=source, scores=given).fingerprint()]
    assert len(set(prints)) == len(prints)


def test_rows_without_a_score_are_counted_and_refused(tmp_path: Path) -> None:
    given = scores(tmp_path / "some.jsonl", data(tmp_path / "data"), leave_out="bf")
    with pytest.raises(ConfigError, match=r"2 of 6 rows have no difference in .*some.jsonl \(the first is .*code.*:2"):
        chosen(tmp_path, scores=given)
    assert chosen(tmp_path, scores=given, max_missing=0.4, keep=1.0) == {"code": "acd", "prose": "e"}


def test_scores_without_a_teacher_have_no_difference(tmp_path: Path) -> None:
    given = scores(tmp_path / "alone.jsonl", data(tmp_path / "data"), teacher=False)
    with pytest.raises(ConfigError, match="6 of 6 rows have no difference"):
        chosen(tmp_path, scores=given)
    assert chosen(tmp_path, scores=given, by="student", per_domain=True)["prose"] == "e"


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (dict(keep=0.0), "data.keep is 0.0"),
        (dict(stage=3, stages=2), "data.stage is 3 of data.stages=2"),
        (dict(max_missing=1.0), "data.max_missing is 1.0"),
        (dict(by=[]), "data.by is empty"),
        (dict(scores="nowhere.jsonl"), "there is no file nowhere.jsonl"),
    ],
)
def test_wrong_settings_are_refused(tmp_path: Path, settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        chosen(tmp_path, **settings)


def test_a_file_of_something_else_is_named_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "other.jsonl"
    file.write_text('{"text": "no scores"}\n')
    with pytest.raises(ConfigError, match=r"other.jsonl:1 is no line of `evaluation=row_scores`"):
        chosen(tmp_path, scores=str(file))
