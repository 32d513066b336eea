"""From config to objects."""

from __future__ import annotations

import pytest
import torch

from kdcli.api import Data, Objective, Teacher
from kdcli.config.build import build, build_terms, optimizer_factory, schedule_factory
from kdcli.errors import ConfigError

JSONL = {"_target_": "kdcli.data.jsonl.Jsonl", "path": "recipes://data/mini/valid"}
KL = {"_target_": "kdcli.objective.forward_kl.ForwardKL", "weight": 0.5}


def test_settings_reach_the_constructor() -> None:
    objective = build({**KL, "temperature": 2, "domains": ["a"]}, Objective)
    assert (objective.weight, objective.temperature, objective.domains) == (0.5, 2, ("a",))


def test_components_inside_components_are_built() -> None:
    mixture = build({"_target_": "kdcli.data.mixture.Mixture", "domains": {"a": JSONL, "b": JSONL}}, Data)
    assert {name: type(source).__name__ for name, source in mixture.sources.items()} == {"a": "Jsonl", "b": "Jsonl"}


def test_terms_keep_their_names_and_null_is_left_out() -> None:
    terms = build_terms(
        {"kd": KL, "off": None, "ce": {"_target_": "kdcli.objective.cross_entropy.CrossEntropy"}}, Objective
    )
    assert {name: type(term).__name__ for name, term in terms.items()} == {"kd": "ForwardKL", "ce": "CrossEntropy"}
    assert build_terms(None, Objective) == {}


def test_a_variable_is_read_when_the_object_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODEL", "some/model")
    node = {"_target_": "kdcli.teacher.hf.HFTeacher", "path": "${oc.env:MODEL}"}
    assert build(node, Teacher).path == "some/model"
    assert node["path"] == "${oc.env:MODEL}"


@pytest.mark.parametrize(
    "node",
    [
        {"_target_": "os.system", "command": "true"},
        {"_target_": "kdcli.teacher.hf.HFTeacher", "path": "x"},
        {**KL, "temprature": 1},
        {"weight": 1},
        {**KL, "temperature": -1},
    ],
)
def test_anything_else_is_refused(node: dict) -> None:
    with pytest.raises(ConfigError):
        build(node, Objective)


def test_optimizer_and_schedule_are_made_once_there_are_parameters() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    make = optimizer_factory({"_target_": "torch.optim.AdamW", "lr": 0.1, "betas": [0.9, 0.95]})
    optimizer = make([{"params": [parameter]}])
    assert optimizer.defaults["betas"] == (0.9, 0.95)
    linear = {
        "_target_": "transformers.get_linear_schedule_with_warmup",
        "num_warmup_steps": 0,
        "num_training_steps": 4,
    }
    schedule = schedule_factory(linear)(optimizer)
    rates = []
    for _ in range(4):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0.1, 0.075, 0.05, 0.025])
