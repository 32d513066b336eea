"""What every option of `augmentation` and every prompt file holds to; a new one is picked up by itself."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from kdcli.api import Example, Transform
from kdcli.command.catalog import first_comment
from kdcli.config.build import build
from kdcli.store import paths
from kdcli.store.examples import BadRow, content_key
from kdcli.text.prompt import Prompt
from tests.desks import FakeDesk, run

CONFIGS = paths.configs()
OPTIONS = sorted((CONFIGS / "augmentation").glob("*.yaml"))
PROMPTS = sorted((CONFIGS / "prompt").rglob("*.yaml"))
ID = re.compile(r"arXiv:\d{4}\.\d{4,5}|\(([^)]+)\)|ours|19\d\d|20\d\d")
META: dict[str, Any] = {
    "source": "seeds",
    "license": "CC0-1.0",
    "answer": "84",
    "topic": "tides",
    "label": "positive",
    "view": "steps",
    "labels": ["positive", "negative"],
    "rationale": "because",
    "critique": "too short",
    "rubric": "Is it right?",
    "triples": [["Elva", "flows into", "Lake Orn"]],
    "history": ["A Fog in May"],
    "verb": "open",
    "noun": "window",
    "passages": [{"text": "The bridge is old.", "id": "1", "score": 1.0}],
    "principles": ["Be kind."],
    "wanted": 3,
    "demos": [{"prompt": "1 + 1?", "response": "2", "text": "one"}],
    "task": "find a fact",
    "language": "German",
    "tools": [{"name": "clock", "description": "the time", "arguments": {}}],
    "error": "NameError",
    "output": "84",
    "assistant_role": "a sailor",
    "user_role": "a beginner",
    "document": "Salt is mined.",
    "tests": "assert True",
    "style": "plain",
    "length": "short",
    "audience": "pupils",
    "head": "Alex pays",
    "relation": "xEffect",
    "correct": True,
    "by": "student",
    "environment": {"arms": [0.2, 0.8], "steps": 2},
    "draft": "a draft",
    "share": 1.0,
    "lm": 1.0,
}
FILES = {"documents": "The bridge is old.\nSalt is mined.\n", "against": "Who built the bridge of a far country?\n"}
SETTINGS: dict[str, dict[str, Any]] = {
    "reshape": {"rows": [{"prompt": "{{ prompt }}?"}, {"prompt": "{{ prompt }}!"}]},
    "lm": {"model": "recipes://data/tiny_teacher"},
    "expand": {"count": 5},
    "diverse": {"share": 0.5},
}
TEXT = {"annotate"}  # steps whose rows are texts


def ids(file: Path) -> str:
    return file.relative_to(CONFIGS).with_suffix("").as_posix()


def samples(name: str) -> list[Example]:
    """Three groups of two answers, of two domains; or texts."""
    if name in TEXT:
        return [Example(text=f"Text {i} of 17 * 2.", meta=META | {"id": i}) for i in range(6)]
    return [
        Example(
            prompt=f"How much is {i // 2} times 12?",
            response=f"It is {i % 2}. The answer is 84.",
            group=f"g{i // 2}",
            score=float(i),
            domain="ab"[i // 4],
            meta=META | {"id": i, "by": "student" if i % 2 else "teacher"},
        )
        for i in range(6)
    ]


def step(name: str, folder: Path) -> Transform:
    node = yaml.safe_load((CONFIGS / "augmentation" / f"{name}.yaml").read_text())
    node |= SETTINGS.get(name, {})
    for key, text in FILES.items():
        if node.get(key) == "???":
            file = folder / f"{key}.txt"
            file.write_text(text)
            node[key] = str(file) if key == "documents" else [str(file)]
    assert "???" not in node.values(), f"give {name} what it requires, in SETTINGS"
    return build(node, Transform)


@pytest.mark.parametrize("file", OPTIONS, ids=lambda file: file.stem)
def test_a_step_rehearses_on_sample_rows_and_does_the_same_again(file: Path, tmp_path: Path) -> None:
    """Rows come out, groups stand together, whoever is asked is named, and every new text says who wrote it."""
    outcomes = []
    for _ in range(2):
        made = step(file.stem, tmp_path)
        desk = FakeDesk(rehearsal=True, folder=tmp_path)
        made.open(desk)
        rows = list(made(samples(file.stem)))
        outcomes.append((rows, desk.asked, desk.reasons))
        assert rows, desk.reasons
        assert {writer for writer, _ in desk.asked} <= set(made.writers())
        assert all(request.rehearsal for _, request in desk.asked)
        groups = [row.group for row in rows if row.group is not None]
        assert sum(a != b for a, b in itertools.pairwise(groups)) == max(0, len(set(groups)) - 1)
        known = {content_key(row) for row in samples(file.stem)}
        if desk.asked:
            assert all(row.meta.get("written") for row in rows if content_key(row) not in known)
        assert all(row.meta.get("license") == "CC0-1.0" for row in rows)
        assert isinstance(made.fingerprint(), str)
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("file", OPTIONS, ids=lambda file: file.stem)
def test_a_step_without_rows_makes_none(file: Path, tmp_path: Path) -> None:
    made = step(file.stem, tmp_path)
    made.open(FakeDesk(folder=tmp_path))
    assert list(made([])) == []


@pytest.mark.parametrize("file", OPTIONS, ids=lambda file: file.stem)
def test_a_step_that_asks_sets_rows_aside_when_calls_fail(file: Path, tmp_path: Path) -> None:
    """Every answer is of no use: nothing is raised, and every row is told of, or was left as it is."""
    made = step(file.stem, tmp_path)
    if not made.writers():
        pytest.skip("asks nobody")
    rows = run(made, samples(file.stem), lambda _: "", folder=tmp_path)
    assert made.desk.asked  # type: ignore[attr-defined]
    assert made.desk.reasons  # type: ignore[attr-defined]
    known = {content_key(row) for row in samples(file.stem)}
    assert all(content_key(row) in known for row in rows)


SOURCES = "".join(file.read_text() for file in (paths.PACKAGE / "augmentation").glob("*.py"))
GIVEN = sorted(set(re.findall(r'"(\w+)"', SOURCES)))  # names that steps may give to templates stand quoted in one


@pytest.mark.parametrize("file", PROMPTS, ids=ids)
def test_a_prompt_names_its_paper_and_its_example_parses(file: Path) -> None:
    line = first_comment(file)
    assert 10 <= len(line) <= 110
    assert not line.endswith(".")
    prompt = Prompt.load(str(file), where="here", extra=GIVEN)
    assert re.search(ID, prompt.paper), prompt.paper
    records = prompt.parser(prompt.example)
    assert all(set(record) <= set(prompt.parser.fields) for record in records)
    prompt.parser.form()


@pytest.mark.parametrize("file", PROMPTS, ids=ids)
def test_a_prompt_renders_or_says_which_field_is_missing(file: Path) -> None:
    prompt = Prompt.load(str(file), where="here", extra=GIVEN)
    row = Example(prompt="Why?", response="So.", text="A text.", chosen="a", rejected="b", score=1.0, meta=META)
    given = {"demos": [row], "count": 2, "topic": "tides", "other": row, "round": 1, "principle": "x"}
    for one in (row, Example(prompt="Why?"), Example(text="A text.", meta=META)):
        try:
            messages = prompt.messages(one, **given)
        except BadRow as error:
            reason = error.reason
        else:
            reason = "lacks a field"
            assert messages[-1]["role"] == "user"
            assert all(message["content"] for message in messages)
        assert reason == "lacks a field"
