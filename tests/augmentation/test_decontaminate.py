"""Decontamination: planted items leave, with the place of the item, and nothing else does."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from kdcli.api import Example
from kdcli.augmentation.decontaminate import COMMON, Decontaminate
from kdcli.errors import ConfigError
from kdcli.store import paths
from tests.desks import FakeDesk, run

VOCABULARY = [f"w{i}" for i in range(900)]


def text(draw: random.Random, count: int) -> str:
    return " ".join(draw.choice(VOCABULARY) for _ in range(count))


@pytest.fixture
def sets(tmp_path: Path) -> Path:
    """An evaluation set with other columns than ours, and one of plain lines."""
    draw = random.Random(0)
    items = [{"task_id": f"T/{i}", "question": text(draw, 30), "answer": "yes", "n": 3} for i in range(20)]
    items += [{"task_id": "T/20", "question": text(draw, 10), "answer": "42"}]
    items += [{"task_id": "T/21", "question": "How deep is it?", "choices": ["deep", "not deep"], "answer": "deep"}]
    (tmp_path / "set.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    (tmp_path / "lines.txt").write_text(text(draw, 20) + "\n\n" + text(draw, 20) + "\n")
    return tmp_path


def questions(sets: Path) -> list[str]:
    return [json.loads(line)["question"] for line in (sets / "set.jsonl").read_text().splitlines()]


def sift(rows: list[Example], against: Path | list[str], **settings: Any) -> tuple[list[Example], FakeDesk]:
    step = Decontaminate(against=[str(against)] if isinstance(against, Path) else against, **settings)
    kept = run(step, rows)
    assert isinstance(step.desk, FakeDesk)
    return kept, step.desk


def clean(draw: random.Random, meta: int) -> Example:
    return Example(prompt=text(draw, 40), response=text(draw, 40), meta={"id": meta})


def test_planted_items_leave_and_nothing_else(sets: Path) -> None:
    draw, asked = random.Random(1), questions(sets)
    lines = (sets / "lines.txt").read_text().split("\n")
    thirteen = " ".join(asked[3].split()[5:18])
    planted = {
        7: Example(prompt=f"{text(draw, 9)} {thirteen.upper()}! {text(draw, 9)}", response="x"),
        11: Example(prompt="x", response=f"{text(draw, 5)}, {lines[2]}"),
        20: Example(prompt=f"Say: {' '.join(asked[20].split()[1:9])}", response="x"),
        31: Example(prompt="how deep is it", response="x"),
        40: Example(messages=[{"role": "user", "content": asked[0]}, {"role": "assistant", "content": "yes"}]),
    }
    rows = [planted.get(i) or clean(draw, i) for i in range(60)]
    kept, desk = sift(rows, sets)
    assert [row for row, _ in desk.set_aside] == list(planted.values())
    assert kept == [row for i, row in enumerate(rows) if i not in planted]
    assert set(desk.reasons) == {"contaminated"}


def test_twelve_words_of_a_long_item_and_answers_alone_are_no_overlap(sets: Path) -> None:
    asked = questions(sets)
    twelve = " ".join(asked[3].split()[5:17])
    rows = [
        Example(prompt=f"a b {twelve} c d", response="yes"),
        Example(prompt="deep", response="not deep"),
        Example(prompt="Explain: how deep is it?", response="42"),
        Example(prompt=" ".join(asked[20].split()[:7]), response="x"),
    ]
    assert sift(rows, sets)[0] == rows


def test_file_line_and_words_are_named(sets: Path) -> None:
    step = Decontaminate(against=[str(sets / "set.jsonl")])
    step.open(FakeDesk())
    found = step.reason(Example(prompt=questions(sets)[4], response="x"))
    assert found is not None
    assert found[1].endswith(f"13 words in a row with {sets / 'set.jsonl'}:5")
    step = Decontaminate(against=["recipes://data/mini/valid"])
    step.open(FakeDesk())
    line = (paths.recipes() / "data/mini/valid/health.jsonl").read_text("utf-8").splitlines()[1]
    found = step.reason(Example(text=json.loads(line)["text"]))
    assert found is not None
    assert found[1].endswith("with recipes://data/mini/valid/health.jsonl:2")


def test_boilerplate_of_many_items_is_passed_over_but_repeated_items_are_not(tmp_path: Path) -> None:
    draw = random.Random(2)
    head = text(draw, 15)
    items = [f"{head} {text(draw, 20)}" for _ in range(COMMON + 1)] + [text(draw, 20)] * (COMMON + 1)
    (tmp_path / "set.txt").write_text("\n".join(items))
    rows = [Example(prompt=f"{head} {text(draw, 9)}"), Example(prompt=items[0]), Example(prompt=items[-1])]
    assert sift(rows, tmp_path)[0] == rows[:1]


def test_a_contaminated_prompt_takes_its_group_and_an_answer_only_itself(sets: Path) -> None:
    asked = questions(sets)
    rows = [Example(prompt=asked[1], response=r, group="a") for r in "xy"]
    rows += [Example(prompt="fine", response=r, group="b") for r in ("x", asked[2], "y")]
    kept, _ = sift(rows, sets)
    assert [(row.group, row.response) for row in kept] == [("b", "x"), ("b", "y")]


def test_what_is_read_decides_the_fingerprint_and_a_rehearsal_keeps_all(sets: Path) -> None:
    step = Decontaminate(against=[str(sets)])
    before = step.fingerprint()
    rows = [Example(prompt=questions(sets)[0], response="x")]
    assert run(step, rows, rehearsal=True) == rows
    (sets / "lines.txt").write_text("other\n")
    assert step.fingerprint() != before


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (dict(against=[]), "name files"),
        (dict(against=["no/such/file.jsonl"]), "is no file"),
        (dict(against=["recipes://data/define.jsonl"], n=5), "8 or more"),
    ],
)
def test_bad_settings_name_the_way_out(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        run(Decontaminate(**settings), [])


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "set.jsonl").write_text('{"a": 1}\n{broken\n')
    with pytest.raises(ConfigError, match=r"set\.jsonl:2"):
        sift([], tmp_path)
