"""The engine's shards: exact resume, other world sizes and stages, no code in a checkpoint."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest
import torch

from kdcli.engine.zero import Zero
from kdcli.errors import ConfigError
from tests.distributed import run_ranks
from tests.engine.test_zero import Toy, advance, same, started

HALF, ALL = 3, 6


def save_half(settings, folder: Path, make=None):
    """Train `HALF` steps, save, and train on to `ALL`."""
    arguments = {"make": make} if make else {}
    engine = started(settings, Toy(), **arguments)
    advance(engine, range(HALF))
    engine.save(folder)
    return advance(engine, range(HALF, ALL)), engine.lr, engine.full_state_dict()


def load_half(settings, folder: Path, make=None):
    """Load and train from `HALF` to `ALL`; also says whether the groups kept their settings."""
    arguments = {"make": make} if make else {}
    engine = started(settings, Toy(), **arguments)
    engine.load(folder)
    history = advance(engine, range(HALF, ALL))
    decay = [group["weight_decay"] for group in engine._engine.basic_optimizer.param_groups]
    return history, engine.lr, engine.full_state_dict(), decay


def identical(left, right):
    for name, value in left.items():
        torch.testing.assert_close(right[name], value, rtol=0, atol=0)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16_autocast"])
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_resume_is_bit_exact(stage, world_size, precision, tmp_path):
    settings = {"stage": stage, "precision": precision}
    saved = run_ranks(world_size, save_half, settings, tmp_path / "ds")
    loaded = run_ranks(world_size, load_half, settings, tmp_path / "ds")
    assert loaded[0][:2] == saved[0][:2]
    identical(saved[0][2], loaded[0][2])


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_sgd_resumes_too(stage, tmp_path):
    def sgd(groups):
        return torch.optim.SGD(groups, lr=0.1, momentum=0.9)

    saved = run_ranks(2, save_half, {"stage": stage}, tmp_path / "ds", sgd)
    loaded = run_ranks(2, load_half, {"stage": stage}, tmp_path / "ds", sgd)
    assert loaded[0][0] == saved[0][0]


LAYOUTS = [(0, 1), (0, 2), (1, 2), (2, 1), (2, 2), (3, 1), (3, 2)]


@pytest.mark.parametrize("source", LAYOUTS)
def test_other_stages_and_world_sizes_continue(source, tmp_path):
    """Every layout reads every other; the numbers differ only by the order of a sum over ranks."""
    stage, world_size = source
    saved = run_ranks(world_size, save_half, {"stage": stage}, tmp_path / "ds")
    before = sorted(path.name for path in tmp_path.rglob("*"))
    for stage, world_size in [layout for layout in LAYOUTS if layout != source]:
        loaded = run_ranks(world_size, load_half, {"stage": stage}, tmp_path / "ds")
        same(loaded[0][0], saved[0][0], 1e-5)
        assert loaded[0][1] == saved[0][1], "the schedule goes on"
        assert loaded[0][3] == [0.1, 0.0], "each group keeps its weight decay"
        for name, value in saved[0][2].items():
            torch.testing.assert_close(loaded[0][2][name], value, rtol=0, atol=2e-5)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before, "nothing is left behind"


def test_bf16_continues_in_another_layout_from_its_32_bit_copy(tmp_path):
    settings = {"stage": 2, "precision": "bf16"}
    saved = run_ranks(2, save_half, settings, tmp_path / "ds")
    for stage, world_size in itertools.product((1, 3), (1, 2)):
        loaded = run_ranks(world_size, load_half, {"stage": stage, "precision": "bf16"}, tmp_path / "ds")
        same(loaded[0][0], saved[0][0], 2e-3)


def test_what_cannot_be_resharded_is_refused(tmp_path):
    def sgd(groups):
        return torch.optim.SGD(groups, lr=0.1)

    def refused():
        engine = started({"stage": 2}, Toy(), sgd)
        with pytest.raises(ConfigError, match="Adam"):
            engine.load(tmp_path / "ds")

    run_ranks(2, save_half, {"stage": 2}, tmp_path / "ds", sgd)
    run_ranks(1, refused)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ds"]


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("name", ["mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"])
def test_a_shard_that_runs_code_is_refused(name, world_size, tmp_path):
    """Directly loaded with one rank, resharded with two; the pickle must not run in either."""

    def refused():
        engine = started({"stage": 2}, Toy())
        with pytest.raises(ConfigError, match="could run code"):
            engine.load(tmp_path / "ds")

    run_ranks(1, save_half, {"stage": 2}, tmp_path / "ds")
    torch.save({"module": Evil(tmp_path / "marker")}, tmp_path / "ds" / name)
    run_ranks(world_size, refused)
    assert not (tmp_path / "marker").exists()


def test_no_programs_in_a_checkpoint(tmp_path):
    run_ranks(1, save_half, {"stage": 2}, tmp_path / "ds")
    assert {path.suffix for path in (tmp_path / "ds").iterdir()} == {".pt", ".json"}
    assert not (tmp_path / "latest").exists()


SCHEDULES = {
    "lambda": lambda o, steps: torch.optim.lr_scheduler.LambdaLR(o, lambda step: max(0.0, 1 - step / steps)),
    "cosine": lambda o, steps: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=steps),
    "sequence": lambda o, steps: torch.optim.lr_scheduler.SequentialLR(
        o,
        [
            torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=2),
            torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=steps - 2),
        ],
        milestones=[2],
    ),
}


def rates(schedule, lr, steps, begin, end, folder, save):
    """Learning rates of the steps from `begin` on, saving at `HALF` or loading first."""
    engine = Zero(stage=2, precision="fp32")
    engine.start()
    engine.prepare(
        Toy(),
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=lr, weight_decay=10 * lr),
        lr_schedule=lambda optimizer: SCHEDULES[schedule](optimizer, steps),
        micro_size=2,
    )
    if not save:
        engine.load(folder)
    seen = []
    for step in range(begin, end):
        if save and step == HALF:
            engine.save(folder)
        seen.append(engine.lr)
        advance(engine, range(step, step + 1))
    return seen, engine._engine.basic_optimizer.param_groups[0]["weight_decay"]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedule_goes_on_exactly_and_with_changed_settings(schedule, tmp_path):
    [(whole, _)] = run_ranks(1, rates, schedule, 1e-2, 8, 0, 8, tmp_path / "ds", True)
    [(rest, _)] = run_ranks(1, rates, schedule, 1e-2, 8, HALF, 8, tmp_path / "ds", False)
    assert rest == whole[HALF:], "unchanged: bit for bit"
    [(doubled, decay)] = run_ranks(1, rates, schedule, 2e-2, 8, HALF, 8, tmp_path / "ds", False)
    assert doubled == pytest.approx([2 * rate for rate in rest])
    assert decay == pytest.approx(0.2)
    [(longer, _)] = run_ranks(1, rates, schedule, 1e-2, 12, HALF, 12, tmp_path / "ds", False)
    assert longer[-1] > 0
    assert longer[1] > rest[1], "a longer schedule falls more slowly"
