"""The commit protocol: a checkpoint is whole or not there, and the newest whole one is found."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kdcli.api import Engine
from kdcli.errors import ConfigError, KDError
from kdcli.train import checkpoint, state
from tests.distributed import collect_ranks, run_ranks


class Files(Engine):
    """An engine whose shards are one text file per rank."""

    def __init__(self, text: str = "weights") -> None:
        self.text = text
        self.device = torch.device("cpu")
        if torch.distributed.is_initialized():
            self.rank, self.world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()

    def save(self, folder: Path) -> None:
        from kdcli.store.fault import fault

        folder.mkdir(exist_ok=True)
        (folder / f"shard-{self.rank}").write_text(self.text)
        fault("ckpt.shard", rank=self.rank)

    def load(self, folder: Path) -> None:
        self.text = (folder / f"shard-{self.rank}").read_text()

    def gather(self, value: Any) -> list[Any]:
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(values, value)
        return values

    def start(self): ...
    def prepare(self, module, *, optimizer, lr_schedule, micro_size): ...
    def __call__(self, *args, **kwargs): ...
    def backward(self, loss, *, last): ...
    def step(self):
        return 0.0

    @property
    def lr(self):
        return 0.0

    def sum(self, values):
        return dict(values)

    def full_state_dict(self):
        return {}


STATE = {"step": 3, "loader": {"cursor": [1, 2]}, "noise": torch.arange(3.0), "nothing": None}


def saved(folder: Path, *steps: int, keep: int = 2, spare: Path | None = None) -> Files:
    engine = Files()
    for step in steps:
        checkpoint.save(folder, engine, step=step, state=STATE, keep=keep, spare=spare, note={"tokens": 7})
    return engine


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def found(folder: Path) -> checkpoint.Checkpoint:
    result = checkpoint.find(folder)
    assert result is not None
    return result


def test_what_is_saved_is_found_and_read(tmp_path):
    saved(tmp_path, 3)
    result = found(tmp_path)
    assert result.step == 3
    assert result.commit["tokens"] == 7
    assert set(result.commit["files"]) == {
        "engine/shard-0",
        "random-00000.safetensors",
        "state.json",
        "state.safetensors",
    }
    engine = Files("other")
    back = checkpoint.load(result, engine)
    assert engine.text == "weights"
    assert torch.equal(back.pop("noise"), STATE["noise"])
    assert back == {key: value for key, value in STATE.items() if key != "noise"}


def test_the_newest_are_kept_and_never_fewer_than_two(tmp_path):
    saved(tmp_path, 1, 2, 3, 4, keep=3)
    assert names(tmp_path) == ["step-000002", "step-000003", "step-000004"]
    saved(tmp_path, 5, keep=1)
    assert names(tmp_path) == ["step-000004", "step-000005"]


def test_the_one_a_run_began_with_is_spared(tmp_path):
    saved(tmp_path, 1)
    saved(tmp_path, 2, 3, 4, spare=tmp_path / "step-000001")
    assert names(tmp_path) == ["step-000001", "step-000003", "step-000004"]


def test_steps_beyond_six_digits_are_in_order(tmp_path):
    saved(tmp_path, 999_999, 1_000_000, 1_000_001)
    assert found(tmp_path).step == 1_000_001
    assert names(tmp_path) == ["step-1000000", "step-1000001"]


DAMAGE = {
    "a flipped byte": lambda p: (p / "engine/shard-0").write_text("weighty"),
    "a truncated file": lambda p: (p / "state.safetensors").write_bytes((p / "state.safetensors").read_bytes()[:40]),
    "a missing file": lambda p: (p / "random-00000.safetensors").unlink(),
    "an empty commit": lambda p: (p / "COMMIT.json").write_text(""),
    "a missing commit": lambda p: (p / "COMMIT.json").unlink(),
    "a commit of another kind": lambda p: (p / "COMMIT.json").write_text("[1]"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_skipped_by_name(damage, tmp_path, caplog):
    saved(tmp_path, 1, 2)
    before = {path: path.read_bytes() for path in (tmp_path / "step-000002").rglob("*") if path.is_file()}
    DAMAGE[damage](tmp_path / "step-000002")
    changed = [path for path, content in before.items() if not path.exists() or path.read_bytes() != content]
    assert found(tmp_path).step == 1
    assert changed[0].name in caplog.text


def test_when_all_are_damaged_it_is_an_error_and_not_a_fresh_start(tmp_path):
    assert checkpoint.find(tmp_path) is None
    saved(tmp_path, 1, 2)
    for step in (1, 2):
        shutil.rmtree(tmp_path / f"step-00000{step}/engine")
    with pytest.raises(ConfigError, match=r"step-000002/engine/shard-0(.|\n)*no whole checkpoint is left"):
        checkpoint.find(tmp_path)


def test_a_damaged_one_is_replaced_when_its_step_comes_again(tmp_path):
    saved(tmp_path, 1, 2)
    DAMAGE["a flipped byte"](tmp_path / "step-000002")
    saved(tmp_path, 2)
    assert found(tmp_path).step == 2
    assert names(tmp_path) == ["step-000001", "step-000002"]


def test_what_lies_beyond_the_step_is_set_aside_not_deleted(tmp_path):
    saved(tmp_path, 1, 2)
    checkpoint.abandon_after(tmp_path, 1)
    assert names(tmp_path) == ["abandoned-step-000002", "step-000001"]


FAULTS = {
    "ckpt.shard": (1, [".tmp-step-000002", "step-000001"]),
    "ckpt.before_commit": (1, [".tmp-step-000002", "step-000001"]),
    "ckpt.after_rename": (2, ["step-000001", "step-000002"]),
}


@pytest.mark.parametrize("point", FAULTS)
def test_a_process_killed_in_a_save_leaves_the_last_whole_one(point, tmp_path):
    saved(tmp_path, 1)
    env = {"KDCLI_TESTING": "1", "KDCLI_FAULT": f"{point}:kill"}
    [(ok, outcome)] = collect_ranks(1, saved, tmp_path, 2, env=env)
    assert not ok
    assert "-9" in outcome
    newest, left = FAULTS[point]
    assert names(tmp_path) == left
    assert found(tmp_path).step == newest
    checkpoint.clean(tmp_path)
    assert names(tmp_path) == [name for name in left if not name.startswith(".tmp")]


def test_a_process_killed_while_it_deletes_has_the_new_one(tmp_path):
    saved(tmp_path, 1, 2)
    env = {"KDCLI_TESTING": "1", "KDCLI_FAULT": "ckpt.rotate:kill"}
    collect_ranks(1, saved, tmp_path, 3, env=env)
    assert found(tmp_path).step == 3
    saved(tmp_path, 4)
    assert names(tmp_path) == ["step-000003", "step-000004"]


def test_a_full_disk_on_one_rank_fails_all_and_leaves_the_last_one(tmp_path):
    def refused():
        try:
            saved(tmp_path, 2)
        except KDError as error:
            return str(error)

    run_ranks(2, saved, tmp_path, 1)
    env = {"KDCLI_TESTING": "1", "KDCLI_FAULT": "ckpt.shard:rank=1:enospc"}
    for message in run_ranks(2, refused, env=env):
        assert "rank 1" in message
        assert "no space left" in message
        assert "MiB are needed" in message
    assert names(tmp_path) == ["step-000001"]


def test_every_rank_writes_and_every_file_is_hashed(tmp_path):
    run_ranks(2, saved, tmp_path, 1)
    commit = json.loads((tmp_path / "step-000001/COMMIT.json").read_text())
    on_disk = {
        str(p.relative_to(tmp_path / "step-000001")) for p in (tmp_path / "step-000001").rglob("*") if p.is_file()
    }
    assert set(commit["files"]) == on_disk - {"COMMIT.json"}
    assert {"engine/shard-0", "engine/shard-1", "random-00001.safetensors"} <= on_disk
    assert commit["world_size"] == 2


def test_random_numbers_go_on(tmp_path):
    def draw():
        return [random.random(), random.gauss(0, 1), *np.random.rand(2), *np.random.randn(1), *torch.rand(2).tolist()]

    state.seed_random(1, rank=0)
    draw()
    state.write_random(tmp_path, rank=0)
    expected = draw()
    state.seed_random(2, rank=0)
    state.restore_random(tmp_path, rank=0)
    assert draw() == expected


def test_ranks_draw_different_numbers_and_the_same_each_time():
    def first(seed, rank):
        state.seed_random(seed, rank)
        return random.random(), np.random.rand(), torch.rand(1).item()

    assert first(0, 0) == first(0, 0)
    assert not set(first(0, 0)) & set(first(0, 1))
