"""A plan asks nobody, and says what the run will then do."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kdcli.api import Example, Request, Transform
from kdcli.errors import ConfigError
from kdcli.pipeline.pipeline import Pipeline
from tests.pipeline.parts import Grow, Label, pipeline, seeds
from tests.pipeline.test_desk import Says, label


def never(text: str) -> str:
    raise AssertionError("a plan asked")


def calls(planned: Any) -> list[int]:
    return [sum(one.calls for one in step.writers.values()) for step in planned.steps]


def test_calls_are_exact_where_all_seeds_are_tried(tmp_path: Path) -> None:
    plan = label(tmp_path, Says(never)).plan()
    assert not (tmp_path / "run").exists() and not (tmp_path / "answers.sqlite").exists()
    outcome = label(tmp_path, Says()).run()
    (step,) = plan.steps
    assert plan.exact and plan.seeds == plan.tried == 40
    assert step.writers["teacher"].calls == outcome.spent.calls
    assert step.writers["teacher"].stored == outcome.steps[0].stored
    assert step.aside == {"skipped": outcome.steps[0].aside["skipped"]}


def test_cost_is_tokens_by_price_and_at_most_what_max_tokens_lets_be(tmp_path: Path) -> None:
    file = tmp_path / "seeds.jsonl"
    file.write_text(json.dumps({"prompt": "x"}) + "\n")
    writer = Says(never)
    writer.price_prompt, writer.price_completion = 2e6, 3e6
    total = pipeline(tmp_path, writer, steps={"label": Label()}, settings={}).plan().total
    assert total.prompt_tokens == writer.count_tokens([{"role": "user", "content": "answer: x None"}])
    assert total.completion_tokens == 3  # `an answer`, at a token per 4 bytes
    assert total.cost == 2 * total.prompt_tokens + 3 * 3
    assert total.completion_tokens_most is None and total.cost_most is None
    writer.max_tokens = 10  # type: ignore[attr-defined]
    total = pipeline(tmp_path, writer, steps={"label": Label()}, settings={}).plan().total
    assert total.completion_tokens_most == 10 and total.cost_most == 2 * total.prompt_tokens + 30


@pytest.mark.parametrize(("steps", "expected"), [
    ({"label": Label()}, [1000]),
    ({"label": Label(n=3), "judge": Label()}, [1000, 3000]),
    ({"grow": Grow(count=7), "label": Label()}, [7, 7]),
    ({"label": Label(), "grow": Grow(count=7)}, [1000, 7]),
])  # fmt: skip
def test_what_grows_with_the_seeds_is_scaled_and_what_does_not_stays(
    tmp_path: Path, steps: dict[str, Transform], expected: list[int]
) -> None:
    file = tmp_path / "seeds.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"question {i}"}) + "\n" for i in range(1000)))
    plan = pipeline(tmp_path, Says(never), steps=steps, settings={}).plan(rows=20)
    assert (plan.seeds, plan.tried, plan.exact) == (1000, 20, False)
    assert calls(plan) == expected


def test_what_the_store_answers_costs_nothing_and_what_is_done_is_not_planned(tmp_path: Path) -> None:
    seeds(tmp_path)
    outcome = pipeline(tmp_path, Says()).run()
    again = pipeline(tmp_path, Says(never)).plan()
    assert [step.done for step in again.steps] == [True] * 3 and again.total.calls == 0
    assert again.spent == outcome.spent
    elsewhere = pipeline(tmp_path, Says(never), run="other").plan()
    assert [step.done for step in elsewhere.steps] == [False] * 3
    assert elsewhere.steps[0].writers["teacher"].calls == 0 < elsewhere.steps[0].writers["teacher"].stored


class Lacks(Label):
    """Like a template that names a field which a row lacks."""

    def _questions(self, examples: Iterable[Example]) -> Iterator[tuple[Example, Request]]:
        for example in examples:
            self.desk.aside(example, "lacks a field")
        yield from ()


def test_a_plan_says_what_rows_lack_before_anything_is_paid(tmp_path: Path) -> None:
    (step,) = label(tmp_path, Says(never), steps={"label": Lacks()}).plan().steps
    assert step.aside == {"lacks a field": 40} and step.rows_out == 0


def test_the_key_changes_with_what_decides_the_result_and_with_nothing_else(tmp_path: Path) -> None:
    def key(**more: Any) -> str:
        made: Pipeline = pipeline(tmp_path, Says(concurrency=more.pop("concurrency", 4)), **more)
        return made.key()

    seeds(tmp_path)
    base = key()
    assert base == key(concurrency=9) == key(run="elsewhere") == key(answers="others") == key(max_failed_fraction=0.5)
    others = {key(seed=1), key(settings={}), key(steps={"judge": Label(n=2)})}
    seeds(tmp_path, 41)
    assert len({base, key(), *others}) == 5


def test_a_plan_of_one_row_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least 2 rows"):
        label(tmp_path, Says()).plan(1)
