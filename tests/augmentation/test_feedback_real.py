"""Feedback by a real model, small as it is: forms make its words scores, verdicts and rankings."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from kdcli.api import Transform
from kdcli.config.target import locate
from kdcli.data.jsonl import Jsonl
from kdcli.pipeline.pipeline import Pipeline
from kdcli.store import paths
from kdcli.store.examples import read_examples
from kdcli.writer.hf import HFWriter

Run = Callable[..., Pipeline]


@pytest.fixture(scope="module")
def writer() -> HFWriter:
    return HFWriter(path="recipes://data/tiny_teacher", max_tokens=24, batch=16, closed=True)


@pytest.fixture
def pipeline(tmp_path: Path, writer: HFWriter) -> Run:
    """A pipeline of options by name, over two prompts with an answer each."""
    seeds = tmp_path / "seeds.jsonl"
    rows = [{"prompt": f"Write the number {i}.", "response": str(i), "meta": {"answer": str(i)}} for i in range(2)]
    seeds.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def made(steps: Mapping[str, Mapping[str, Any]]) -> Pipeline:
        settings = {name: {**_option(str(one["option"])), **one} for name, one in steps.items()}
        return Pipeline(
            data=Jsonl(path=str(seeds)),
            steps={name: _step(one) for name, one in settings.items()},
            writers={"teacher": writer, "student": writer},
            settings=settings,
            folder=tmp_path / "run",
            answers=tmp_path / "answers.sqlite",
        )

    return made


def _option(name: str) -> dict[str, Any]:
    return yaml.safe_load((paths.configs() / "augmentation" / f"{name}.yaml").read_text())


def _step(settings: Mapping[str, Any]) -> Transform:
    given = {key: value for key, value in settings.items() if key not in ("_target_", "option")}
    return locate(settings["_target_"], "augmentation")(**given)


def test_the_students_answers_become_preferences(pipeline: Run) -> None:
    """Rollout, a score, a ranking and verdicts in both orders, and a pair of the best and the worst."""
    steps = {
        "answers": {"option": "rollout", "allow_truncated": True},
        "score": {"option": "judge", "prompt": "judge/score"},
        "order": {"option": "rank", "into": "place"},
        "duels": {"option": "compare", "into": "wins"},
        "pairs": {"option": "pair", "keep_ties": True},
    }
    outcome = pipeline(steps).run()
    by_name = {step.name: step for step in outcome.steps}
    assert [by_name[name].rows_out for name in ("answers", "score", "order", "duels")] == [4] * 4
    assert by_name["duels"].asked == 2 * 2
    pairs = list(read_examples(outcome.rows, domain="default"))
    assert len(pairs) == 2
    assert all(0 <= score <= 10 for pair in pairs for score in pair.meta["scores"])
    assert {by for pair in pairs for by in pair.meta["by"]} == {"data", "student"}


def test_an_agent_and_a_conversation_end(pipeline: Run) -> None:
    agent = {"option": "trajectory", "tools": ["calculator"], "keep": "all", "max_steps": 2}
    talk = {"option": "chat", "turns": 2, "allow_truncated": True, "only": "prompt is defined"}
    for steps in ({"agent": agent}, {"talk": talk}):
        outcome = pipeline(steps).run()
        rows = list(read_examples(outcome.rows, domain="default"))
        assert len(rows) + sum(outcome.steps[-1].aside.values()) == 2
        assert rows
        assert all(row.messages and row.messages[-1]["role"] == "assistant" for row in rows)
