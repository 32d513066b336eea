"""What may change between a run and its continuation."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from kdcli.config.resume import compare, moved

OLD: dict[str, Any] = {
    "verb": "distill",
    "run": {"name": "a", "seed": 0, "steps": 10, "log_every": 1},
    "batch": {"size": 8, "micro_size": 4},
    "teacher": {"_target_": "T", "path": "t"},
    "objective": {"kd": {"_target_": "K", "weight": 1.0, "domains": []}},
    "optimizer": {"lr": 0.1},
    "engine": {"stage": 0},
    "launch": {"processes": 1},
    "evaluation": {},
    "optimize": None,
}


def changed(path: str, value: Any) -> dict[str, Any]:
    new = copy.deepcopy(OLD)
    node: Any = new
    *parents, last = path.split(".")
    for parent in parents:
        node = node.setdefault(parent, {})
    node[last] = value
    return new


def test_equal_configs_have_no_changes() -> None:
    assert compare(OLD, copy.deepcopy(OLD)) == ([], [], [])


@pytest.mark.parametrize(
    ("path", "value", "kind"),
    [
        ("run.steps", 20, "free"),
        ("run.dir", "elsewhere", "free"),
        ("run.log_every", 5, "free"),
        ("launch.processes", 2, "free"),
        ("evaluation.heldout", {"_target_": "H"}, "free"),
        ("optimize", "loss/total", "free"),
        ("optimizer.lr", 0.2, "warnings"),
        ("lr_schedule.num_warmup_steps", 3, "warnings"),
        ("engine.stage", 2, "warnings"),
        ("batch.micro_size", 2, "warnings"),
        ("batch.size", 16, "refusals"),
        ("run.seed", 1, "refusals"),
        ("teacher.path", "other", "refusals"),
        ("objective.kd.weight", 0.5, "refusals"),
        ("objective.ce", {"_target_": "C"}, "refusals"),
        ("data.path", "x", "refusals"),
        ("verb", "evaluate", "refusals"),
    ],
)
def test_each_key_is_free_warned_about_or_refused(path: str, value: Any, kind: str) -> None:
    for old, new in ((OLD, changed(path, value)), (changed(path, value), OLD)):
        changes = compare(old, new)
        assert [name for name in changes._fields if getattr(changes, name)] == [kind]
        assert all(line.startswith(path) for line in getattr(changes, kind))


def test_a_change_shows_both_values() -> None:
    assert compare(OLD, changed("batch.size", 16)).refusals == ["batch.size: 8 -> 16"]
    assert compare(OLD, changed("data.path", "x")).refusals == ["data.path: absent -> 'x'"]


def test_keys_of_the_same_data_are_free() -> None:
    both = changed("data.path", "x")
    both["batch"]["size"] = 16
    found = moved(compare(OLD, both))
    assert found == (["data.path: absent -> 'x'"], [], ["batch.size: 8 -> 16"])


@pytest.mark.parametrize("kind", ["linear", "cosine", "taid", "epochs", "constant"])
def test_more_steps_are_warned_about_where_a_schedule_is_spread_over_them(kind: str) -> None:
    kd = {"_target_": "K", "weight": 1.0, "temperature": {"schedule": kind}}
    old, new = ({**changed("run.steps", steps), "objective": {"kd": kd, "off": None}} for steps in (10, 20))
    spread = ["objective.kd.temperature spread over run.steps: 10 -> 20"]
    assert compare(old, new) == (["run.steps: 10 -> 20"], spread if kind in ("linear", "cosine", "taid") else [], [])
    assert compare(old, copy.deepcopy(old)) == ([], [], [])


def test_another_schedule_is_another_objective() -> None:
    new = changed("objective.kd.weight", {"schedule": "linear", "start": 1, "end": 0})
    assert compare(OLD, new).refusals[0] == "objective.kd.weight: 1.0 -> absent"


def test_an_augmentation_may_cost_more_but_asks_the_same() -> None:
    old = {
        "augmentation": {"answer": {"n": 1}},
        "writer": {"teacher": {"model": "a", "concurrency": 1, "price_prompt": 0.0}},
        "budget": {"max_calls": 1},
        "augment": {"answers": "a.sqlite"},
    }
    new = {
        "augmentation": {"answer": {"n": 2}},
        "writer": {"teacher": {"model": "b", "concurrency": 9, "price_prompt": 1.0}},
        "budget": {"max_calls": 2},
        "augment": {"answers": "b.sqlite"},
    }
    changes = compare(old, new)
    assert [line.partition(":")[0] for line in changes.refusals] == ["augmentation.answer.n", "writer.teacher.model"]
    assert len(changes.free) == 4 and not changes.warnings
