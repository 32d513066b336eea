"""`kdcli distill` up to the launch: folders, what is written, what is found again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from kdcli.command import runs
from kdcli.store.lock import RunLock

Command = Callable[..., object]


def only_run(folder: Path = Path("runs/distill")) -> Path:
    (run,) = [child for child in folder.iterdir() if child.is_dir()]
    return run


def test_a_run_folder_says_what_was_run(kdcli, pretend) -> None:
    assert kdcli("distill", *pretend).code == 0
    run = only_run()
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["verb"] == "distill"
    assert config["run"]["dir"] == str(run)
    assert config["lr_schedule"]["num_training_steps"] == 2  # interpolations are resolved
    assert "${" not in (run / "config.yaml").read_text()
    assert "hydra" not in config
    assert yaml.safe_load((run / "overrides.yaml").read_text()) == pretend
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["command"].startswith("kdcli distill launch=pretend")
    assert manifest["versions"]["torch"]
    assert manifest["seed"] == 0
    assert "LICENSES.md" in manifest["data"][0]["licence"]
    assert run.stat().st_mode & 0o777 == 0o700


def test_two_runs_of_one_second_get_two_folders(kdcli, pretend) -> None:
    for _ in range(3):
        assert kdcli("distill", *pretend, "run.dir=runs/x/${now:%Y}").code == 0
    names = sorted(child.name for child in Path("runs/x").iterdir() if child.is_dir())
    assert len(names) == 3
    assert names[1:] == [f"{names[0]}-2", f"{names[0]}-3"]


def test_a_complete_run_is_not_run_again(kdcli, pretend) -> None:
    assert kdcli("distill", *pretend, "run.dir=a").code == 0
    before = {file: file.stat().st_mtime_ns for file in Path("a").rglob("[!.]*")}
    again = kdcli("distill", *pretend, "run.dir=a")
    assert again.code == 0
    assert "already complete" in again.out
    assert {file: file.stat().st_mtime_ns for file in Path("a").rglob("[!.]*")} == before


def test_more_steps_go_on_and_another_objective_does_not(kdcli, pretend) -> None:
    assert kdcli("distill", *pretend, "run.dir=a").code == 0
    assert kdcli("distill", *pretend, "run.dir=a", "run.steps=5").code == 0
    assert yaml.safe_load(Path("a/config.yaml").read_text())["run"]["steps"] == 5
    assert json.loads(Path("a/manifest.json").read_text())["continued"]
    refused = kdcli("distill", *pretend, "run.dir=a", "objective.kd.temperature=2")
    assert refused.code == 2
    assert "objective.kd.temperature: 1.0 -> 2" in refused.err
    assert yaml.safe_load(Path("a/config.yaml").read_text())["objective"]["kd"]["temperature"] == 1.0


def test_a_changed_learning_rate_is_warned_about(kdcli, pretend) -> None:
    kdcli("distill", *pretend, "run.dir=a")
    result = kdcli("distill", *pretend, "run.dir=a", "run.steps=5", "optimizer.lr=0.5")
    assert result.code == 0
    assert "warning: a goes on with optimizer.lr: 0.0001 -> 0.5" in result.err


def test_a_run_that_saved_nothing_may_be_corrected(kdcli, pretend) -> None:
    assert kdcli("distill", *pretend, "run.dir=a", "launch.fail_at_lr=0.5", "optimizer.lr=0.5").code == 4
    assert kdcli("distill", *pretend, "run.dir=a", "batch.size=4").code == 0


def test_never_refuses_a_used_folder(kdcli, pretend) -> None:
    kdcli("distill", *pretend, "run.dir=a")
    result = kdcli("distill", *pretend, "run.dir=a", "run.steps=9", "run.resume=never")
    assert result.code == 2
    assert "run.resume=never" in result.err


def test_a_folder_with_other_files_is_left_alone(kdcli, pretend, tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/thesis.tex").write_text("x")
    result = kdcli("distill", *pretend, "run.dir=docs")
    assert result.code == 2
    assert "holds files, but no run" in result.err
    assert [f.name for f in (tmp_path / "docs").iterdir()] == ["thesis.tex"]


def test_a_folder_in_use_is_refused_and_unchanged(kdcli, pretend) -> None:
    kdcli("distill", *pretend, "run.dir=a")
    before = Path("a/config.yaml").read_text()
    with RunLock(Path("a")):
        result = kdcli("distill", *pretend, "run.dir=a", "run.steps=9")
    assert result.code == 2
    assert "in use by process" in result.err
    assert Path("a/config.yaml").read_text() == before


def test_a_secret_is_written_as_the_name_of_its_variable(kdcli, pretend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLACE", "recipes://data/mini/valid")
    assert kdcli("distill", *pretend, "data.path=${oc.env:PLACE}").code == 0
    run = only_run()
    written = "".join(file.read_text() for file in run.iterdir() if file.is_file())
    assert "${oc.env:PLACE}" in written
    assert "PLACE" in yaml.safe_load((run / "config.yaml").read_text())["data"]["path"]


def test_resume_takes_the_runs_own_config(kdcli, pretend) -> None:
    kdcli("distill", *pretend, "run.dir=a", "optimizer.lr=0.25")
    assert "already complete" in kdcli("resume", "a").out
    assert kdcli("resume", "a", "run.steps=7").code == 0
    config = yaml.safe_load(Path("a/config.yaml").read_text())
    assert (config["run"]["steps"], config["optimizer"]["lr"]) == (7, 0.25)
    assert config["lr_schedule"]["num_training_steps"] == 7  # the schedule ends where the run ends


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "which run?"),
        (("nowhere",), "nowhere: is not a run folder"),
        (("a", "run.stepz=3"), "run.stepz: the run's config has no such key; did you mean run.steps?"),
        (("a", "batch.size=64", "run.steps=9"), "batch.size: 8 -> 64"),
        (("a", "optimizer.lr=fast", "run.steps=9"), "optimizer.lr: is 'fast', but must be a number"),
        (("a", "rubbish"), "rubbish: is not KEY=VALUE"),
    ],
)
def test_resume_refuses_what_it_cannot_do(kdcli, pretend, arguments: tuple[str, ...], says: str) -> None:
    kdcli("distill", *pretend, "run.dir=a")
    before = Path("a/config.yaml").read_text()
    result = kdcli("resume", *arguments)
    assert result.code == 2
    assert says in result.err
    assert Path("a/config.yaml").read_text() == before


def test_a_broken_config_of_a_run_is_named(kdcli, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for text in ("{", "[1]", "x: 1"):
        (tmp_path / "a/config.yaml").write_text(text)
        result = kdcli("resume", "a")
        assert result.code == 2
        assert "a/config.yaml" in result.err


def test_evaluate_takes_the_student_of_a_run(kdcli, pretend) -> None:
    kdcli("distill", *pretend, "run.dir=a")
    evaluate = ["evaluate", "launch=pretend", "evaluation.heldout.data.path=recipes://data/mini/valid", "run.dir=b"]
    result = kdcli(*evaluate, "student.path=a")
    assert result.code == 2
    assert "has exported no student yet; finish it: kdcli resume a" in result.err
    Path("a/student").mkdir()
    assert kdcli(*evaluate, "student.path=a").code == 0
    assert yaml.safe_load(Path("b/config.yaml").read_text())["student"]["path"] == "a/student"


def test_new_folders_never_collide(tmp_path: Path) -> None:
    made = [runs._new(tmp_path / "x" / "same") for _ in range(5)]
    assert len(set(made)) == 5
