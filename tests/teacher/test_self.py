"""The student as its own teacher: which weights teach, what a resume brings back, a richer prompt."""

from __future__ import annotations

import copy
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kdcli.api import Batch, Need, TeacherView
from kdcli.engine.zero import Zero
from kdcli.errors import ConfigError
from kdcli.objective.forward_kl import ForwardKL
from kdcli.objective.policy_gradient import PolicyGradient
from kdcli.teacher.self import SelfTeacher
from kdcli.train.distiller import Distiller
from tests import runs, toys
from tests.distributed import run_ranks


class Toy(toys.ToyStudent):
    tokenizer = None


def whole(_: Any) -> Any:
    return nullcontext()


def moved(student: nn.Module, step: int) -> None:
    """An optimizer step of a kind: other weights, the same for the same step."""
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


def weights(module: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def trained(teacher: SelfTeacher, steps: int, dtype: torch.dtype = torch.float32) -> list[dict[str, torch.Tensor]]:
    """The student's weights at the start and after each step, which the teacher has seen."""
    student = Toy(toys.llama(1).to(dtype))
    teacher.follow(student)
    seen = [weights(student)]
    for step in range(1, steps + 1):
        moved(student, step)
        teacher.after_step(student, step, whole)
        seen.append(weights(student))
    return seen


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 8e-3)])
def test_an_average_is_its_closed_form(dtype: str, tolerance: float) -> None:
    """decay^n theta_0 + (1 - decay) sum_i decay^(n - i) theta_i; of a bfloat16 student as near as bfloat16 can be, and
    kept in float32 between steps: with decay 0.999 a bfloat16 average would never move."""
    teacher = SelfTeacher(mode="ema", decay=0.999)
    thetas = trained(teacher, 5, getattr(torch, dtype))
    for name, own in weights(teacher.student).items():
        expected = 0.999**5 * thetas[0][name].double()
        for i in range(1, 6):
            expected += 0.001 * 0.999 ** (5 - i) * thetas[i][name].double()
        torch.testing.assert_close(own.double(), expected, rtol=tolerance, atol=1e-6)
        kept = teacher.state_dict()["weights"][name]
        assert kept.dtype == torch.float32
        torch.testing.assert_close(kept.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("every", "expected"), [(0, 0), (2, 4), (5, 5), (7, 0)])
def test_a_snapshot_is_of_the_last_step_that_it_was_due(every: int, expected: int) -> None:
    teacher = SelfTeacher(every=every)
    thetas = trained(teacher, 5)
    for name, own in weights(teacher.student).items():
        assert torch.equal(own, thetas[expected][name])
    assert bool(teacher.state_dict()) == (expected > 0), "what follow() gives need not be saved"


@pytest.mark.parametrize(
    "settings", [{"mode": "ema", "decay": 0.5}, {"every": 2}, {"mode": "ema", "dtype": "bfloat16"}]
)
def test_state_brings_everything_back(settings: dict[str, Any]) -> None:
    teacher = SelfTeacher(**settings)
    trained(teacher, 3)
    other = SelfTeacher(**settings)
    student = Toy(toys.llama(1))
    other.follow(student)
    other.load_state_dict(copy.deepcopy(teacher.state_dict()))
    for step in range(1, 4):
        moved(student, step)
    for one in (teacher, other):
        one.after_step(student, 4, whole)
    assert all(torch.equal(a, weights(other.student)[name]) for name, a in weights(teacher.student).items())


def test_what_does_not_learn_is_not_saved() -> None:
    student = Toy(toys.llama(1, tied=False))
    student.model.get_input_embeddings().requires_grad_(False)
    teacher = SelfTeacher(mode="ema")
    teacher.follow(student)
    teacher.after_step(student, 1, whole)
    saved = teacher.state_dict()["weights"]
    assert saved
    assert set(saved) == {name for name, p in student.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("mode", ["snapshot", "ema", "current"])
def test_no_dropout_and_no_gradient_reach_the_student(mode: Any) -> None:
    model = toys.llama(1)
    model.config.attention_dropout = 0.9
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.9
    student = Toy(model.train())
    teacher = SelfTeacher(mode=mode)
    teacher.follow(student)
    first, second = (teacher.annotate(toys.batch(), Need.DISTRIBUTION) for _ in range(2))
    assert first.hidden is not None
    assert not first.hidden.requires_grad
    assert torch.equal(first.hidden, second.hidden)
    assert not torch.equal(student(toys.batch()), first.hidden), "the student itself still has dropout"


def prompted(seed: int = 0, rows: int = 4) -> Batch:
    """A batch whose teacher reads five other tokens before each row."""
    batch = toys.batch(seed, rows=rows)
    extra = torch.randint(0, toys.VOCAB, (rows, 5), generator=torch.Generator().manual_seed(seed + 1))
    length = batch.input_ids.shape[1]
    batch.teacher = TeacherView(
        input_ids=torch.cat([extra, batch.input_ids], 1),
        attention_mask=torch.cat([torch.ones_like(extra, dtype=torch.bool), batch.attention_mask], 1),
        position=(5 + torch.arange(length)).expand(rows, -1).masked_fill(~batch.mask, -1),
    )
    return batch


def test_it_reads_its_own_prompt() -> None:
    batch, student = prompted(), Toy(toys.llama(1).eval())
    teacher = SelfTeacher(mode="current")
    teacher.follow(student)
    signal = teacher.annotate(batch, Need.DISTRIBUTION | Need.LOGPROBS)
    assert batch.teacher is not None
    with torch.no_grad():
        logits = student.model(batch.teacher.input_ids, attention_mask=batch.teacher.attention_mask.long()).logits[
            :, 5:
        ]
    assert signal.head is not None and signal.hidden is not None and signal.logprobs is not None
    torch.testing.assert_close(signal.head(signal.hidden)[batch.mask], logits[batch.mask], rtol=1e-4, atol=1e-4)
    expected = torch.log_softmax(logits, -1).gather(-1, batch.targets[..., None])[..., 0]
    torch.testing.assert_close(signal.logprobs[batch.mask], expected[batch.mask], rtol=1e-4, atol=1e-4)


def distilled(stage: int, precision: str, mode: str) -> tuple[list[float], float]:
    """The losses of 8 steps of distilling the prompted self, and how far the copy is from the mean of the student."""
    shard_all: dict[str, Any] = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    engine = Zero(stage=stage, precision=precision, deepspeed=shard_all if stage == 3 else None)  # type: ignore[arg-type]
    engine.start()
    student = Toy(toys.llama(1))
    settings: dict[str, Any] = {"decay": 0.5} if mode == "ema" else {}
    teacher = SelfTeacher(mode=mode, **settings)  # type: ignore[arg-type]
    teacher.place(engine)
    teacher.follow(student)
    average = weights(student)
    distiller = Distiller(student, teacher, {"kd": ForwardKL(), "policy": PolicyGradient(weight=0.01)}, chunk=2)
    engine.prepare(
        distiller,
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=2e-2),
        lr_schedule=lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0),
        micro_size=1,
    )
    losses = []
    for step in range(1, 9):
        mine = [_row(prompted(rows=2), i) for i in range(engine.rank, 2, engine.world_size)]
        counts: dict[str, float] = {}
        for batch in mine:
            counts = {name: counts.get(name, 0.0) + value for name, value in distiller.count(batch).items()}
        counts = engine.sum(counts)
        total = 0.0
        for batch in mine:
            loss, _ = engine(batch, counts=counts)
            engine.backward(loss, last=batch is mine[-1])
            total += float(loss.detach())
        engine.step()
        teacher.after_step(student, step, engine.whole)
        for name, p in _read(engine, student).items():
            average[name] = 0.5 * average[name] + 0.5 * p.float()
        losses.append(engine.sum({"loss": total})["loss"])
    apart = 0.0
    if mode == "ema":
        apart = max(float((average[name] - own).abs().max()) for name, own in weights(teacher.student).items())
    engine.close()
    return losses, apart


def _read(engine: Zero, student: nn.Module) -> dict[str, torch.Tensor]:
    with engine.whole(student.parameters()):
        return weights(student)


def _row(batch: Batch, row: int) -> Batch:
    one, view = toys.rows_of(batch, row, row + 1), batch.teacher
    assert view is not None
    window = slice(row, row + 1)
    one.teacher = TeacherView(
        input_ids=view.input_ids[window], attention_mask=view.attention_mask[window], position=view.position[window]
    )
    return one


@pytest.mark.parametrize("mode", ["current", "ema"])
def test_every_stage_learns_its_prompted_self_as_one_process_does(mode: str) -> None:
    """The KL to the prompted self falls, and the average is that of the whole parameters, whoever shards them."""
    (alone,) = run_ranks(1, distilled, 0, "fp32", mode)
    assert alone[0][-1] < 0.5 * alone[0][0]
    for stage in (2, 3):
        for losses, apart in run_ranks(2, distilled, stage, "fp32", mode):
            assert losses == pytest.approx(alone[0], rel=1e-4)
            assert apart < 1e-6


def test_an_average_of_16_bit_parameters_is_kept_in_32() -> None:
    """The engine's parameters are bfloat16, the copy is as the student was loaded: float32."""
    for _, apart in run_ranks(2, distilled, 3, "bf16", "ema"):
        assert apart < 1e-6


@pytest.mark.parametrize(
    ("ranks", "stage", "settings"),
    [(1, 0, {"mode": "snapshot", "every": 3}), (2, 2, {"mode": "ema"}), (2, 3, {"mode": "ema", "dtype": "bfloat16"})],
)
def test_a_run_goes_on_exactly(ranks: int, stage: int, settings: dict[str, Any], tmp_path: Path) -> None:
    """Killed after step 4, it goes on from step 4's checkpoint; without the teacher's state it would not."""
    told = changes(stage, settings)
    straight = runs.write_run(tmp_path / "straight", **told)
    assert runs.work(straight, ranks=ranks) == [0] * ranks
    stopped = runs.write_run(tmp_path / "stopped", **told)
    assert runs.work(stopped, ranks=ranks, fault="step.optim:step=5:kill") != [0] * ranks
    assert runs.checkpoints(stopped) == ["step-000004"]
    assert runs.work(stopped, ranks=ranks) == [0] * ranks
    assert runs.lines(stopped) == runs.lines(straight)
    saved = json.loads((stopped / "checkpoints" / "step-000006" / "state.json").read_text())
    assert saved["teacher"]["weights"], "the copy is no longer the student as it began"
    assert len({line["loss/kd"] for line in runs.lines(straight)}) > 2


def changes(stage: int, settings: dict[str, Any]) -> dict[str, Any]:
    shard_all = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    return {
        "run__steps": 6,
        "run__save_every": 4,
        "teacher": {"_target_": "kdcli.teacher.self.SelfTeacher", "decay": 0.5, **settings},
        "student__tokenizer": "recipes://data/tiny_teacher",
        "objective": {
            "kd": {"_target_": "kdcli.objective.forward_kl.ForwardKL"},
            "ce": {"_target_": "kdcli.objective.cross_entropy.CrossEntropy"},
        },
        "engine__stage": stage,
        "engine__deepspeed": shard_all if stage == 3 else None,
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "ema", "every": 2}, "set mode=snapshot"),
        ({"every": -1}, "is -1"),
        ({"decay": 1.0}, "is 1.0"),
        ({"mode": "current", "dtype": "bfloat16"}, "has no copy"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SelfTeacher(**settings)


def test_there_is_nothing_to_cache() -> None:
    with pytest.raises(ConfigError, match="changes as it learns"):
        SelfTeacher().fingerprint()
