"""Every option of the group `objective`, by its YAML file, through every check of the conformance suite."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from kdcli.api import Batch, Objective, StudentOutput, TeacherSignal
from kdcli.errors import ConfigError
from kdcli.train.conformance.candidate import Candidate
from kdcli.train.conformance.suite import CHECKS, Check, outcome_of
from kdcli.train.schedule import start_values
from tests.toys import batch as toy_batch

CONFIGS = sorted((Path(__file__).parents[2] / "configs/objective").glob("*.yaml"))
V = 19
every_objective = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)


def parts(path: Path) -> tuple[type[Objective], dict[str, Any]]:
    """The class that a YAML file names, and its settings."""
    node = start_values(yaml.safe_load(path.read_text()))
    module, name = node.pop("_target_").rsplit(".", 1)
    return getattr(importlib.import_module(module), name), node


def build(path: Path, **settings: object) -> Objective:
    kind, node = parts(path)
    return kind(**{**node, **settings})


def chunk(targets: int = 9) -> tuple[Batch, Tensor, Tensor]:
    """One gathered chunk: a batch of B = 1, and logits [1, C, V] of teacher and student in float64."""
    generator = torch.Generator().manual_seed(5)
    whole = toy_batch(vocab=V, rows=1, length=targets)
    whole.mask.fill_(True)
    y, z = (2 * torch.randn(1, targets, V, generator=generator, dtype=torch.float64) for _ in range(2))
    return whole, y, z


@every_objective
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_passes(path: Path, check: Check) -> None:
    kind, settings = parts(path)
    outcome = outcome_of(check, Candidate.of(kind, name=path.stem, **settings))
    if not outcome.applies:
        pytest.skip(outcome.note)
    assert outcome.passed, outcome


@every_objective
def test_has_a_second_formula_and_a_closed_form(path: Path) -> None:
    kind, settings = parts(path)
    assert Candidate.of(kind, **settings).oracle is not None
    batch, y, z = chunk()
    closed = build(path).closed_form(batch, StudentOutput(logits=z), TeacherSignal(logits=y))
    assert closed is not None
    assert closed[1].shape == z.shape


@every_objective
def test_refuses_a_temperature_that_is_not_positive(path: Path) -> None:
    if "temperature" not in parts(path)[1]:
        pytest.skip("it has no temperature")
    for temperature in (0.0, -1.0):
        with pytest.raises(ConfigError, match="temperature is"):
            build(path, temperature=temperature)
