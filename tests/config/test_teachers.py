"""Teachers made of others: what is wrong is said before weights load, with its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from kdcli.config.check import check
from kdcli.errors import ConfigError
from tests import families, runs

TINY = runs.config()["teacher"]
ENSEMBLE = {"_target_": "kdcli.teacher.ensemble.Ensemble"}
REFERENCE = {"_target_": "kdcli.teacher.with_reference.WithReference"}
SELF = {"_target_": "kdcli.teacher.self.SelfTeacher"}
REWARD = {"_target_": "kdcli.teacher.reward_model.RewardModelTeacher"}
OWN = {"student__tokenizer": "recipes://data/tiny_teacher"}


def problems(folder: Path, teacher: dict[str, Any], **changes: Any) -> str:
    config = yaml.safe_load((runs.write_run(folder, teacher=teacher, **changes) / "config.yaml").read_text())
    try:
        check(config)
    except ConfigError as error:
        return "\n".join(error.problems)
    return ""


def other(folder: Path) -> dict[str, Any]:
    """A teacher with another tokenizer."""
    return {**TINY, "path": families.folder(folder / "other")}


@pytest.mark.parametrize("teacher", [ENSEMBLE, REFERENCE])
def test_a_path_that_names_nothing_is_named_with_its_place(teacher: dict[str, Any], tmp_path: Path) -> None:
    wrong = {**TINY, "path": "./nowhere/model"}
    inside = {"teachers": {"a": TINY, "b": wrong}} if teacher is ENSEMBLE else {"reference": wrong, "teacher": TINY}
    place = "teacher.teachers.b.path" if teacher is ENSEMBLE else "teacher.reference.path"
    assert f"{place}: there is no file or folder" in problems(tmp_path, {**teacher, **inside})


def test_sound_ones_pass(tmp_path: Path) -> None:
    both = {"teachers": {"a": TINY, "b": TINY}}
    assert problems(tmp_path, {**ENSEMBLE, **both}) == ""
    domains = {"prose": "a", "verse": {"a": 1, "b": 2.5}}
    assert problems(tmp_path, {**ENSEMBLE, **both, "choose": "domain", "domains": domains}) == ""
    assert problems(tmp_path, {**REFERENCE, "reference": TINY, "teacher": TINY}) == ""
    assert problems(tmp_path, {**SELF, "mode": "ema"}, **OWN) == ""


def test_domains_and_names_are_known(tmp_path: Path) -> None:
    both = {**ENSEMBLE, "teachers": {"prose": TINY, "b": TINY}}
    said = problems(tmp_path, {**both, "choose": "name"})
    assert "no teacher has the name of domain verse" in said
    said = problems(tmp_path, {**both, "choose": "domain", "domains": {"prose": "b"}})
    assert "teacher.domains: says nothing of domain verse; add teacher.domains.verse=NAME" in said
    assert "(of data)" in said
    said = problems(tmp_path, {**both, "weights": {"c": 1}})
    assert "there is no teacher c; there are b, prose" in said
    said = problems(tmp_path, {**both, "weights": {"b": "much"}})
    assert "teacher.weights.b: is 'much', but must be a number" in said


def test_members_have_one_tokenizer(tmp_path: Path) -> None:
    said = problems(tmp_path, {**ENSEMBLE, "teachers": {"a": TINY, "b": other(tmp_path)}})
    assert "a and b have different tokenizers" in said


def test_who_is_asked_about_the_students_tokens_has_its_tokenizer(tmp_path: Path) -> None:
    foreign = other(tmp_path)
    uld = {"kd": {"_target_": "kdcli.objective.uld.ULD"}}
    said = problems(tmp_path, {**REFERENCE, "reference": foreign, "teacher": TINY}, objective=uld, **OWN)
    assert said.startswith("teacher.reference: its tokenizer is not the student's")
    said = problems(tmp_path, {**ENSEMBLE, "teachers": {"a": foreign, "b": foreign}}, objective=uld, **OWN)
    assert said.startswith("teacher: its tokenizer is not the student's")


def test_what_a_teacher_does_not_give_is_refused(tmp_path: Path) -> None:
    said = problems(tmp_path, {**REFERENCE, "reference": TINY})
    assert "needs the teacher's distribution, which WithReference does not provide" in said
    hidden = {"h": {"_target_": "kdcli.objective.hidden_mse.HiddenMSE"}}
    said = problems(tmp_path, {**ENSEMBLE, "teachers": {"a": TINY, "b": TINY}}, objective=hidden)
    assert "needs the teacher's hidden, which Ensemble does not provide" in said


def test_a_student_that_teaches_itself_reads_another_prompt(tmp_path: Path) -> None:
    assert "teacher.mode: current is the student itself" in problems(tmp_path, {**SELF, "mode": "current"}, **OWN)
    row = {"prompt": "the cat", "response": "sat on a mat", "teacher_prompt": "the cat and the dog"}
    with (tmp_path / "data" / "prose.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    assert problems(tmp_path, {**SELF, "mode": "current"}, **OWN) == ""


def test_a_scheduler_that_measures_the_teacher_once_has_one_that_stays(tmp_path: Path) -> None:
    ddk = {"_target_": "kdcli.domain_scheduler.ddk.DDK"}
    said = problems(tmp_path, {**SELF, "mode": "ema"}, domain_scheduler=ddk, **OWN)
    assert "it changes as the student learns, but DDK measures the teacher once" in said


def test_a_reward_model_gives_one_number(tmp_path: Path) -> None:
    said = problems(tmp_path, {**REWARD, "path": "recipes://data/tiny_teacher", "teacher": TINY})
    assert "has 2 labels, but a reward model has one" in said
