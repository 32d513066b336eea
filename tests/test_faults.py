"""FAULTS.md A.3, injected at named points of whole runs. Rows that need real processes are in test_faults_processes."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import pytest
import torch

from kdcli.store.lock import RunLock
from tests import runs


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """A run of four steps with evaluations, that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run_dir = runs.write_run(folder, **evaluated(folder))
    assert runs.work(run_dir) == [0]
    return run_dir


def evaluated(folder: Path) -> dict:
    return {"evaluation": runs.heldout(folder), "run__eval_every": 2}


def begun(folder: Path, **changes) -> Path:
    return runs.write_run(folder, **{**evaluated(folder), **changes})


# -------------------------------------------------------------------------------------------------- row 1: signals


SIGNALS = {"term": 143, "int": 130}
PLACES = [
    ("step.optim:step=1", 1),
    ("step.optim:step=3", 1),
    ("step.optim:step=3", 2),
    ("step.optim:step=4", 1),
    ("eval:step=0", 1),
    ("eval:step=2", 2),
    ("eval:step=4", 1),
]


@pytest.mark.parametrize(("place", "ranks"), PLACES)
def test_a_signal_saves_and_the_run_goes_on_exactly(place, ranks, tmp_path, undisturbed, capfd):
    name = "term" if place.startswith("step") else "int"
    run_dir = begun(tmp_path)
    where = f"{place}:{name}" if ranks == 1 else f"{place}:rank=1:{name}"  # to one rank only: all must agree
    codes = runs.work(run_dir, ranks=ranks, fault=where)
    assert codes == [SIGNALS[name]] * ranks
    state = runs.state(run_dir)
    assert state["state"] == "interrupted"
    assert state["exit_code"] == SIGNALS[name]
    assert state["resumable"]
    assert f"kdcli resume {run_dir}" in capfd.readouterr().err
    assert runs.checkpoints(run_dir)[-1] == f"step-{state['step']:06d}"
    assert runs.work(run_dir, ranks=ranks) == [0] * ranks
    if ranks == 1:
        assert runs.lines(run_dir) == runs.lines(undisturbed)
    assert [line["step"] for line in runs.lines(run_dir)] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_while_data_are_prepared_ends_at_once(name, tmp_path, capfd):
    run_dir = begun(tmp_path)
    assert runs.work(run_dir, fault=f"data.prepare:{name}") == [SIGNALS[name]]
    assert runs.state(run_dir)["state"] == "interrupted"
    assert not runs.state(run_dir)["resumable"]
    assert "before training began" in capfd.readouterr().err
    assert runs.checkpoints(run_dir) == []
    assert runs.work(run_dir) == [0]


def test_a_second_signal_ends_at_once_and_tears_nothing(tmp_path, undisturbed):
    """Two micro-batches are two signals in one step."""
    run_dir = begun(tmp_path)
    started = time.monotonic()
    [code] = runs.work(run_dir, fault="step.forward:step=3:term,step.optim:step=3:sleep=30")
    assert code is None, "os._exit, not a return"
    assert time.monotonic() - started < 20
    assert runs.checkpoints(run_dir) == ["step-000002"]
    assert runs.work(run_dir) == [0]
    assert runs.lines(run_dir) == runs.lines(undisturbed)


# ------------------------------------------------------------------------------- rows 3, 5, 6: dying and full disks


KILLS = ["step.backward:step=1", "step.optim:step=3", "ckpt.shard:step=2", "ckpt.before_commit:step=2",
         "ckpt.after_rename:step=2", "ckpt.before_commit:step=4", "metrics.append:step=3", "eval:step=2"]  # fmt: skip


@pytest.mark.parametrize("point", KILLS)
def test_a_killed_run_goes_on_exactly(point, tmp_path, undisturbed):
    run_dir = begun(tmp_path)
    assert runs.work(run_dir, fault=f"{point}:kill") == [None]
    assert runs.state(run_dir)["state"] == "running", "nobody was left to write another"
    assert runs.work(run_dir) == [0]
    assert runs.lines(run_dir) == runs.lines(undisturbed)
    assert not [name for name in runs.checkpoints(run_dir) if name.startswith(".tmp")]


def test_a_run_killed_many_times_goes_on_exactly(tmp_path, undisturbed):
    run_dir = begun(tmp_path, run__save_every=1)
    for point in ("step.optim:step=2", "ckpt.before_commit:step=2", "ckpt.after_rename:step=3", "step.forward:step=4"):
        assert runs.work(run_dir, fault=f"{point}:kill") == [None]
    assert runs.work(run_dir) == [0]
    assert runs.lines(run_dir) == runs.lines(undisturbed)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_ranks_killed_in_a_save_go_on_exactly(stage, tmp_path):
    whole = begun(tmp_path / "whole", engine__stage=stage)
    assert runs.work(whole, ranks=2) == [0, 0]
    run_dir = begun(tmp_path / "killed", engine__stage=stage)
    codes = runs.work(run_dir, ranks=2, fault="ckpt.shard:rank=1:step=4:kill")
    assert codes[1] is None
    assert codes[0] == 1, "the survivor fails, and does not wait for ever"
    assert "died or did not answer" in runs.state(run_dir)["reason"]
    assert runs.work(run_dir, ranks=2) == [0, 0]
    assert runs.lines(run_dir) == runs.lines(whole)


@pytest.mark.parametrize("point", ["ckpt.shard:step=4", "ckpt.before_commit:step=4", "metrics.append:step=4"])
def test_a_full_disk_is_said_and_the_last_checkpoint_kept(point, tmp_path, capfd, undisturbed):
    run_dir = begun(tmp_path)
    assert runs.work(run_dir, fault=f"{point}:enospc") == [1]
    assert "no space left" in capfd.readouterr().err
    assert runs.checkpoints(run_dir) == ["step-000002"]
    assert runs.state(run_dir)["resumable"]
    assert runs.work(run_dir) == [0]
    assert runs.lines(run_dir) == runs.lines(undisturbed)


def test_a_disk_that_is_really_full(tmp_path, capfd):
    """A tmpfs with room for one checkpoint and not for two; torch reports that as a RuntimeError about a position."""
    run_dir = runs.write_run(tmp_path, run__save_every=1)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", run_dir], capture_output=True)
    if mounted.returncode:
        pytest.skip("may not mount a tmpfs here")
    try:
        runs.write_run(tmp_path, run__save_every=1)
        assert runs.work(run_dir) == [1]
        assert "no space left" in capfd.readouterr().err
        assert runs.checkpoints(run_dir) == ["step-000001"]
    finally:
        subprocess.run(["umount", run_dir], check=True)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "deleted", "uncommitted"])
def test_a_damaged_checkpoint_is_skipped_with_its_reason(damage, tmp_path, undisturbed, capfd):
    run_dir = begun(tmp_path, run__save_every=1)
    assert runs.work(run_dir, fault="step.optim:step=4:kill") == [None]
    assert runs.checkpoints(run_dir) == ["step-000002", "step-000003"]
    shard = run_dir / "checkpoints/step-000003/engine/mp_rank_00_model_states.pt"
    content = shard.read_bytes()
    if damage == "uncommitted":
        (run_dir / "checkpoints/step-000003/COMMIT.json").write_text("")
    elif damage == "deleted":
        shard.unlink()
    else:
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        shard.write_bytes(content[:middle] if damage == "truncated" else flipped)
    assert runs.work(run_dir) == [0]
    warning = capfd.readouterr().err
    assert "skipping a damaged checkpoint" in warning
    assert ("COMMIT.json" if damage == "uncommitted" else shard.name) in warning
    assert runs.lines(run_dir) == runs.lines(undisturbed)
    assert "abandoned-step-000003" in runs.checkpoints(run_dir)


def test_when_every_checkpoint_is_damaged_the_run_does_not_start_again_by_itself(tmp_path, capfd):
    run_dir = begun(tmp_path)
    runs.work(run_dir, fault="step.optim:step=4:kill")
    (run_dir / "checkpoints/step-000002/state.json").unlink()
    before = runs.lines(run_dir)
    assert runs.work(run_dir) == [2]
    assert "run.resume=never" in capfd.readouterr().err
    assert runs.lines(run_dir) == before


# -------------------------------------------------------------------------------------------- rows 7, 8: the numbers


@pytest.mark.parametrize("ranks", [1, 2])
def test_nan_stops_before_the_update(ranks, tmp_path, capfd):
    run_dir = begun(tmp_path)
    fault = "step.forward:step=3:nan" if ranks == 1 else "step.forward:step=3:rank=1:nan"
    codes = runs.work(run_dir, ranks=ranks, fault=fault)
    assert codes == [4] * ranks
    reason = runs.state(run_dir)["reason"]
    assert reason.startswith("step 3 at lr 0.0095")
    assert "loss/total is nan" in reason
    assert "examples " in reason
    assert "the last checkpoint is untouched" in reason
    assert runs.checkpoints(run_dir) == ["step-000002"]
    assert [line["step"] for line in runs.lines(run_dir)] == [0, 1, 2]


def test_an_exploding_learning_rate_ends_with_the_step_and_not_with_garbage(tmp_path):
    run_dir = runs.write_run(tmp_path, optimizer__lr=1e30, engine__gradient_clipping=None, run__steps=8)
    assert runs.work(run_dir) == [4]
    assert "lower optimizer.lr" in runs.state(run_dir)["reason"]
    assert not (run_dir / "student").exists()
    assert all(line["loss/total"] is not None for line in runs.lines(run_dir))


def test_clipping_bounds_the_update_and_the_norm_before_it_is_told(tmp_path):
    """SGD moves by lr x the clipped norm exactly."""

    def moved(clip):
        sgd = {"_target_": "torch.optim.SGD", "lr": 1.0}
        constant = {"_target_": "torch.optim.lr_scheduler.ConstantLR", "factor": 1.0}
        changes = {"optimizer": sgd, "lr_schedule": constant, "engine__gradient_clipping": clip, "run__save_every": 1}
        run_dir = runs.write_run(tmp_path / str(clip), **changes, run__steps=2)
        assert runs.work(run_dir) == [0]
        first, second = (
            torch.load(run_dir / f"checkpoints/step-00000{step}/engine/mp_rank_00_model_states.pt", weights_only=True)
            for step in (1, 2)
        )
        names = set(first["kdcli_order"])
        squares = [(first["module"][n] - second["module"][n]).square().sum() for n in names]
        return sum(squares).sqrt().item(), runs.lines(run_dir)[1]["grad_norm"]

    distance, norm = moved(0.01)
    assert norm > 0.1
    assert distance == pytest.approx(0.01, rel=1e-3)
    distance, norm = moved(None)
    assert distance == pytest.approx(norm, rel=1e-3)


# ----------------------------------------------------------------------------------------- row 11: nothing to learn


def test_no_supervised_token_is_wrong_input(tmp_path, capfd):
    run_dir = runs.write_run(tmp_path)
    row = {"prompt": " ".join(["long"] * 200), "response": "short"}
    (tmp_path / "data/prose.jsonl").write_text(json.dumps(row) + "\n")
    assert runs.work(run_dir) == [2]
    assert "0 of 1 examples have a supervised token" in capfd.readouterr().err
    assert runs.checkpoints(run_dir) == []


# ------------------------------------------------------------------------------------------ row 20: one run a folder


def test_a_folder_in_use_is_refused_and_left_alone(tmp_path, capfd):
    run_dir = runs.write_run(tmp_path)
    assert runs.work(run_dir) == [0]
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    with RunLock(run_dir):
        assert runs.work(run_dir) == [2]
    assert "is in use by process" in capfd.readouterr().err
    changed = {path.name for path in run_dir.rglob("*") if before.get(path) != path.stat().st_mtime_ns}
    assert changed <= {".lock"}


# ---------------------------------------------------------------- rows 21 to 24: another shape, config, or nothing


@pytest.mark.parametrize(("stage", "ranks"), [(3, 1), (0, 1), (1, 2)])
def test_another_stage_and_number_of_processes_go_on(stage, ranks, tmp_path):
    whole = begun(tmp_path / "whole", engine__stage=2)
    assert runs.work(whole) == [0]
    run_dir = begun(tmp_path / "other", engine__stage=2)
    runs.work(run_dir, ranks=2, fault="step.optim:step=3:term")
    begun(tmp_path / "other", engine__stage=stage)
    assert runs.work(run_dir, ranks=ranks) == [0] * ranks
    for line, expected in zip(runs.lines(run_dir), runs.lines(whole), strict=True):
        assert line.keys() == expected.keys()
        assert line["step"] == expected["step"]
        if line["step"] > 0:
            assert line["tokens"] == expected["tokens"]
            assert line["lr"] == expected["lr"]


def test_the_losses_do_not_depend_on_processes_or_stage(tmp_path):
    """Without dropout, whose random numbers are a rank's own."""
    expected = None
    for stage, ranks in [(0, 1), (0, 2), (1, 2), (2, 2), (3, 2)]:
        folder = tmp_path / f"{stage}-{ranks}"
        run_dir = runs.write_run(folder, engine__stage=stage)
        content = runs.config()["student_init"]["config"] | {"attention_dropout": 0.0}
        runs.write_run(folder, engine__stage=stage, student_init__config=content)
        assert runs.work(run_dir, ranks=ranks) == [0] * ranks
        losses = [line["loss/total"] for line in runs.lines(run_dir)]
        expected = expected or losses
        assert losses == pytest.approx(expected, rel=1e-5)


def test_a_changed_learning_rate_takes_effect_on_resume(tmp_path, undisturbed):
    run_dir = begun(tmp_path)
    runs.work(run_dir, fault="step.optim:step=3:kill")
    begun(tmp_path, optimizer__lr=0.001)
    assert runs.work(run_dir) == [0]
    was, now = ([line.get("lr") for line in runs.lines(folder)] for folder in (undisturbed, run_dir))
    assert now[:3] == was[:3]
    assert now[3:] == pytest.approx([rate / 10 for rate in was[3:]])


def test_a_finished_run_is_not_trained_again(tmp_path):
    run_dir = runs.write_run(tmp_path)
    assert runs.work(run_dir) == [0]
    kept = [*run_dir.glob("checkpoints/*/*"), run_dir / "metrics.jsonl"]
    before = {path: path.stat().st_mtime_ns for path in kept}
    lines = runs.lines(run_dir)
    assert runs.work(run_dir, fault="step.forward:kill") == [0]
    assert runs.lines(run_dir) == lines
    assert {p: p.stat().st_mtime_ns for p in kept if p.parent != run_dir} == {
        p: time for p, time in before.items() if p.parent != run_dir
    }


def test_a_finished_run_is_trained_on_for_more_steps(tmp_path):
    whole = runs.write_run(tmp_path / "whole", run__steps=6)
    assert runs.work(whole) == [0]
    run_dir = runs.write_run(tmp_path / "longer")
    assert runs.work(run_dir) == [0]
    runs.write_run(tmp_path / "longer", run__steps=6)
    assert runs.work(run_dir) == [0]
    assert runs.lines(run_dir) == runs.lines(whole)


def test_nothing_to_resume_begins_at_the_beginning_and_a_path_to_nothing_is_refused(tmp_path, capfd):
    run_dir = runs.write_run(tmp_path, run__resume=str(tmp_path / "nowhere"))
    assert runs.work(run_dir) == [2]
    assert "run.resume" in capfd.readouterr().err
    runs.write_run(tmp_path)
    assert runs.work(run_dir, fault="step.optim:step=2:kill") == [None], "before the first checkpoint"
    assert runs.work(run_dir) == [0]
    assert [line["step"] for line in runs.lines(run_dir)] == [1, 2, 3, 4]


def test_a_run_may_begin_with_the_checkpoint_of_another(tmp_path):
    first = runs.write_run(tmp_path / "first")
    assert runs.work(first) == [0]
    second = runs.write_run(tmp_path / "second", run__resume=str(first / "checkpoints/step-000002"))
    assert runs.work(second) == [0]
    assert runs.lines(second) == runs.lines(first)[2:]
    assert runs.checkpoints(first) == ["step-000002", "step-000004"]


def test_time_ends_a_run_as_its_last_step_does(tmp_path):
    run_dir = begun(tmp_path, run__steps=10_000, run__minutes=0.02, run__save_every=0)
    assert runs.work(run_dir, ranks=2) == [0, 0]
    lines = runs.lines(run_dir)
    assert runs.state(run_dir)["state"] == "done"
    assert 1 <= lines[-1]["step"] < 10_000
    assert "eval/heldout/all/ppl" in lines[-1]
    assert (run_dir / "student/model.safetensors").is_file()


def test_a_reporter_that_fails_is_switched_off(tmp_path, capfd):
    report = {"board": {"_target_": "kdcli.report.tensorboard.TensorBoard"}}
    run_dir = runs.write_run(tmp_path, report=report)
    (run_dir / "tensorboard").write_text("a file where the reporter wants a folder")
    code = runs.work(run_dir)
    assert code == [0]
    assert "is switched off" in capfd.readouterr().err
    assert len(runs.lines(run_dir)) == 4
