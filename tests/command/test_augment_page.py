"""docs/augmentation.md: its tables are the configs', its recipe, prompt and step do what the page says."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from kdcli.api import Example
from tests.servers.chat import serving

PAGE = Path(__file__).parents[2] / "docs/augmentation.md"


def blocks(kind: str) -> Sequence[str]:
    return re.findall(rf"```{kind}\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)


def test_the_tables_are_what_the_configs_say() -> None:
    from docs.augmentation import page

    text = PAGE.read_text("utf-8")
    assert page(text) == text, "docs/augmentation.md is old: make docs"


def test_the_recipe_and_the_prompt_of_the_page_run(kdcli, tmp_path: Path) -> None:
    recipe, prompt = blocks("yaml")[:2]
    with serving(
        lambda asked: f"<response>Take care with {asked.prompt.split()[2]} and {asked.sample}.</response>"
    ) as server:
        (tmp_path / "mine.yaml").write_text(recipe.replace("https://api.example.com/v1", server.url))
        (tmp_path / "configs/prompt/label").mkdir(parents=True)
        (tmp_path / "configs/prompt/label/cooks.yaml").write_text(prompt)
        (tmp_path / "seeds.jsonl").write_text('{"prompt": "How long beans?"}\n{"prompt": "How hot rice?"}\n')
        command = ["augment", "+recipe=mine.yaml", "run.dir=run", "augmentation.answer.prompt=label/cooks"]
        command += ["writer.teacher.api_key_env=null", "augmentation.unlike.threshold=0.99"]
        plan = kdcli(*command, "--dry-run")
        assert plan.code == 0 and server.asked == 0, plan.err
        done = kdcli(*command, "budget.max_cost=5")
        assert done.code == 0, done.err
    made = [json.loads(line) for line in (tmp_path / "run/rows.jsonl").read_text().splitlines()]
    assert {row["prompt"] for row in made} == {"Cook's question: How long beans?", "Cook's question: How hot rice?"}
    assert len(made) == 4 and all(row["response"].startswith("Take care with") for row in made)


def test_the_step_of_the_page_is_a_step() -> None:
    (code,) = blocks("python")
    names: dict = {}
    exec(code, names)
    (row,) = names["Shout"](marks=2)([Example(prompt="a", response="b")])
    assert row.response == "B!!"
