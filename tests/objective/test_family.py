"""Every option of the group `objective`, by its YAML file, through every check of the conformance suite."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import yaml

from kdcli.api import Objective
from kdcli.errors import ConfigError
from kdcli.train.conformance.candidate import Candidate
from kdcli.train.conformance.case import case
from kdcli.train.conformance.evaluate import by_closed_form
from kdcli.train.conformance.suite import run
from kdcli.train.schedule import start_values

CONFIGS = sorted((Path(__file__).parents[2] / "configs/objective").glob("*.yaml"))
CLOSED_FORMS = (  # what must never hold the logits of a micro-batch, nor a graph of a chunk's
    "alpha_beta",
    "forward_kl",
    "generalized_jsd",
    "hinton",
    "reverse_kl",
    "skew_kl",
    "skew_reverse_kl",
    "symmetric_kl",
    "total_variation",
)
every_objective = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)


def parts(path: Path) -> tuple[type[Objective], dict[str, Any]]:
    """The class that a YAML file names, and its settings."""
    node = start_values(yaml.safe_load(path.read_text()))
    module, name = node.pop("_target_").rsplit(".", 1)
    return getattr(importlib.import_module(module), name), node


def build(path: Path, **settings: object) -> Objective:
    kind, node = parts(path)
    return kind(**{**node, **settings})


def candidate(path: Path) -> Candidate:
    kind, settings = parts(path)
    return Candidate.of(kind, name=path.stem, **settings)


@every_objective
def test_passes_every_check_that_applies(path: Path) -> None:
    verdict = run(candidate(path))
    assert not verdict.failures
    assert sum(outcome.applies for outcome in verdict.outcomes) >= 24


@every_objective
def test_has_a_second_formula(path: Path) -> None:
    assert candidate(path).oracle is not None


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_has_a_closed_form_for_a_dense_and_for_a_top_k_teacher(name: str) -> None:
    one = candidate(next(path for path in CONFIGS if path.stem == name))
    at = case(one)
    assert by_closed_form(one.make(), at) is not None
    assert by_closed_form(one.make(), at.sparse(5, getattr(one.example, "temperature", 1.0))) is not None


@every_objective
def test_refuses_a_temperature_that_is_not_positive(path: Path) -> None:
    if "temperature" not in parts(path)[1]:
        pytest.skip("it has no temperature")
    for temperature in (0.0, -1.0):
        with pytest.raises(ConfigError, match="temperature is"):
            build(path, temperature=temperature)
