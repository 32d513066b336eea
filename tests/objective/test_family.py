"""Every option of the group `objective`, by its YAML file: what all token objectives must satisfy."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

from kdcli.api import Batch, Need, Objective, StudentOutput, TeacherSignal, TopK
from tests.toys import batch as toy_batch

CONFIGS = sorted((Path(__file__).parents[2] / "configs/objective").glob("*.yaml"))
V = 19


def build(path: Path, **settings: object) -> Objective:
    node = yaml.safe_load(path.read_text())
    module, name = node.pop("_target_").rsplit(".", 1)
    return getattr(importlib.import_module(module), name)(**{**node, **settings})


@pytest.fixture(params=CONFIGS, ids=lambda p: p.stem)
def objective(request: pytest.FixtureRequest) -> Objective:
    return build(request.param)


def chunk(targets: int = 9) -> tuple[Batch, Tensor, Tensor]:
    """One gathered chunk: a batch of B = 1, and logits [1, C, V] of teacher and student in float64."""
    generator = torch.Generator().manual_seed(5)
    whole = toy_batch(vocab=V, rows=1, length=targets)
    whole.mask.fill_(True)
    y, z = (2 * torch.randn(1, targets, V, generator=generator, dtype=torch.float64) for _ in range(2))
    return whole, y, z


def test_there_are_objectives() -> None:
    assert {"forward_kl", "reverse_kl", "generalized_jsd", "cross_entropy"} <= {p.stem for p in CONFIGS}


def test_one_finite_number_per_target(objective: Objective) -> None:
    batch, y, z = chunk()
    value = objective(batch, StudentOutput(logits=z), TeacherSignal(logits=y))
    assert value.shape == batch.targets.shape and torch.isfinite(value).all() and (value >= 0).all()


def test_closed_form_equals_autograd(objective: Objective) -> None:
    batch, y, z = chunk()
    closed = objective.closed_form(batch, StudentOutput(logits=z.clone()), TeacherSignal(logits=y))
    assert closed is not None
    leaf = z.clone().requires_grad_()
    value = objective(batch, StudentOutput(logits=leaf), TeacherSignal(logits=y))
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    torch.testing.assert_close(closed[0], value)
    torch.testing.assert_close(closed[1], gradient, rtol=1e-9, atol=1e-12)


def test_logits_may_be_shifted_by_a_constant(objective: Objective) -> None:
    batch, y, z = chunk()
    one = objective(batch, StudentOutput(logits=z), TeacherSignal(logits=y))
    other = objective(batch, StudentOutput(logits=z + 7), TeacherSignal(logits=y - 3))
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("path", [p for p in CONFIGS if "temperature" in p.read_text()], ids=lambda p: p.stem)
def test_t2_scales_value_and_gradient_alike(path: Path) -> None:
    """axolotl's path scaled the value and not the gradient (METHODS D5)."""
    batch, y, z = chunk()
    plain, scaled = (build(path, temperature=3.0, temperature_scale=s) for s in ("none", "t2"))
    for objectives in ((plain, scaled),):
        (v1, g1), (v2, g2) = (
            o.closed_form(batch, StudentOutput(logits=z.clone()), TeacherSignal(logits=y)) for o in objectives
        )  # pyright: ignore
        torch.testing.assert_close(v2, 9 * v1)
        torch.testing.assert_close(g2, 9 * g1)
    leaf = z.clone().requires_grad_()
    (by_autograd,) = torch.autograd.grad(scaled(batch, StudentOutput(logits=leaf), TeacherSignal(logits=y)).sum(), leaf)
    torch.testing.assert_close(g2, by_autograd, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("path", [p for p in CONFIGS if "temperature" in p.read_text()], ids=lambda p: p.stem)
def test_zero_at_p_equals_q_at_any_temperature(path: Path) -> None:
    batch, y, _ = chunk()
    for temperature in (0.5, 1.0, 4.0):
        objective = build(path, temperature=temperature)
        closed = objective.closed_form(batch, StudentOutput(logits=y.clone()), TeacherSignal(logits=y))
        assert closed is not None and closed[0].abs().max() < 1e-12 and closed[1].abs().max() < 1e-12


@pytest.mark.parametrize("path", [p for p in CONFIGS if "temperature" in p.read_text()], ids=lambda p: p.stem)
def test_a_sparse_teacher_of_all_but_one_id_is_the_dense_teacher(path: Path) -> None:
    batch, y, z = chunk()
    objective = build(path, temperature=2.0)
    assert objective.needs == Need.DISTRIBUTION
    logprobs, ids = torch.log_softmax(y / 2, -1).topk(V - 1)
    sparse = TeacherSignal(topk=TopK(ids=ids, logprobs=logprobs, temperature=2.0))
    dense = objective(batch, StudentOutput(logits=z), TeacherSignal(logits=y))
    torch.testing.assert_close(objective(batch, StudentOutput(logits=z), sparse), dense, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"temperature": -1.0}])
@pytest.mark.parametrize("path", [p for p in CONFIGS if "temperature" in p.read_text()], ids=lambda p: p.stem)
def test_a_temperature_that_is_not_positive_is_refused(path: Path, settings: dict[str, float]) -> None:
    with pytest.raises(Exception, match="temperature is"):
        build(path, **settings)
