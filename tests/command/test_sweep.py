"""Sweeps: every job runs, whatever happens to the others; the same command goes on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


def rows() -> list[dict]:
    (folder,) = Path("runs/distill").glob("sweep-*")
    return json.loads((folder / "sweep.json").read_text())


def launched() -> list[str]:
    (file,) = Path("runs/distill").glob("sweep-*/launched")
    return file.read_text().splitlines()


@pytest.mark.parametrize("launcher", ["basic", "joblib"])
def test_a_failed_job_is_a_row_and_the_others_finish(kdcli, pretend, launcher: str) -> None:
    result = kdcli(
        "distill", *pretend, "optimizer.lr=0.1,0.2,0.3", "launch.fail_at_lr=0.2", f"hydra/launcher={launcher}", "-m"
    )
    assert result.code == 1
    assert [row["state"] for row in rows()] == ["done", "failed", "done"]
    assert [row["exit_code"] for row in rows()] == [0, 4, 0]
    assert "job 1 failed (exit 4): NaN at step 1" in result.out
    assert "Traceback" not in result.err
    assert all(line.endswith(" True") for line in launched())  # each in processes of its own


def test_the_table_has_a_row_per_job_and_what_changed(kdcli, pretend) -> None:
    swept = ["objective@objective.kd=forward_kl,reverse_kl", "optimizer.lr=0.1,0.2"]
    result = kdcli("distill", *pretend, *swept, "-m")
    assert result.code == 0
    table = result.out[result.out.rindex("4 jobs in") :].splitlines()
    assert table[1].split() == [
        "job",
        "objective.kd",
        "optimizer.lr",
        "state",
        "step",
        "loss/total",
        "heldout",
        "kl",
        "folder",
    ]
    assert table[2].split()[:7] == ["0", "forward_kl", "0.1", "done", "2", "0.2", "0.1"]
    assert table[5].split()[:7] == ["3", "reverse_kl", "0.2", "done", "2", "0.4", "0.2"]


def test_run_again_it_skips_what_is_done_and_repeats_what_failed(kdcli, pretend) -> None:
    command = ["distill", *pretend, "optimizer.lr=0.1,0.2", "launch.fail_at_lr=0.2", "-m"]
    assert kdcli(*command).code == 1
    assert len(launched()) == 2
    again = kdcli(*command)
    assert again.code == 1
    assert "already complete" in again.out
    assert len(launched()) == 3  # only the failed one once more
    assert [row["state"] for row in rows()] == ["done", "failed"]


def test_a_job_with_wrong_input_is_a_row_too(kdcli, pretend) -> None:
    result = kdcli("distill", *pretend, "batch.size=8,6", "-m")
    assert result.code == 1
    good, bad = rows()
    assert (good["state"], bad["state"], bad["exit_code"]) == ("done", "failed", 2)
    assert "batch.size: 6 is not divisible" in bad["reason"]
    assert "batch.size: 6 is not divisible" in result.out
    folder = Path(bad["folder"])
    assert [file.name for file in folder.iterdir()] == [".job.json"]


def test_the_folder_depends_on_what_is_asked_and_not_on_how(kdcli, pretend) -> None:
    kdcli("distill", *pretend, "run.seed=1,2", "-m")
    kdcli("distill", *pretend, "run.seed=1,2", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "-m")
    assert len(list(Path("runs/distill").glob("sweep-*"))) == 1
    assert len(launched()) == 2
    kdcli("distill", *pretend, "run.seed=1,3", "-m")
    assert len(list(Path("runs/distill").glob("sweep-*"))) == 2


def test_a_folder_of_ones_own_grows(kdcli, pretend) -> None:
    kdcli("distill", *pretend, "run.seed=1,2", "hydra.sweep.dir=mine", "-m")
    result = kdcli("distill", *pretend, "run.seed=1,2,3", "hydra.sweep.dir=mine", "-m")
    assert result.code == 0
    assert "3 jobs in mine" in result.out
    assert len(Path("mine/launched").read_text().splitlines()) == 3


def test_an_interrupted_job_ends_the_sweep(kdcli, pretend) -> None:
    result = kdcli("distill", *pretend, "optimizer.lr=0.1,0.2", "launch.fail_at_lr=0.1", "launch.exit_code=130", "-m")
    assert result.code == 130
    assert "the same command goes on with it" in result.err
    assert len(launched()) == 1


@pytest.mark.slow
def test_optuna_improves_the_metric_that_optimize_names(kdcli, pretend) -> None:
    pytest.importorskip("optuna")
    result = kdcli(
        "distill",
        *pretend,
        "hydra/sweeper=optuna",
        "hydra.sweeper.n_trials=4",
        "hydra.sweeper.n_jobs=1",
        "optimizer.lr=interval(0.1,0.9)",
        "optimize=eval/heldout/all/kl",
        "-m",
    )
    assert result.code == 0, result.err
    (best,) = Path("runs/distill").glob("sweep-*/optimization_results.yaml")
    value = float(best.read_text().split("best_value:")[1])
    assert value == min(row["metrics"]["eval/heldout/all/kl"] for row in rows())
    assert len(rows()) == 4


@pytest.mark.slow
def test_the_same_search_skips_what_is_done(kdcli, pretend) -> None:
    pytest.importorskip("optuna")
    sweeper = [
        "hydra/sweeper=optuna",
        "hydra.sweeper.n_trials=3",
        "optimizer.lr=interval(0.1,0.9)",
        "optimize=loss/total",
    ]
    for _ in range(2):
        assert kdcli("distill", *pretend, *sweeper, "-m").code == 0
        assert len(launched()) == 3


def test_optuna_survives_failed_jobs(kdcli, pretend) -> None:
    pytest.importorskip("optuna")
    sweeper = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=2", "hydra.sweeper.n_jobs=1"]
    result = kdcli(
        "distill", *pretend, *sweeper, "optimizer.lr=choice(0.5)", "launch.fail_at_lr=0.5", "optimize=loss/total", "-m"
    )
    assert result.code == 1
    assert "job 0 failed (exit 4)" in result.out or "job 1 failed (exit 4)" in result.out
