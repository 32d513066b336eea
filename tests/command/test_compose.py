"""What Hydra composes for us: references stay references, leftovers go, code is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from kdcli.command.compose import compose, hydra, plain
from kdcli.command.guard import refuse_code
from kdcli.errors import ConfigError


def composed(*overrides: str, verb: str = "distill") -> dict:
    with hydra() as app:
        return plain(compose(app, verb, overrides), verb)


def test_an_environment_variable_is_never_read_while_composing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_THING", "hunter2")
    config = composed("+recipe=tiny", "run.name=${oc.env:SECRET_THING}", "teacher.path=x-${run.name}")
    assert config["run"]["name"] == "${oc.env:SECRET_THING}"
    assert config["teacher"]["path"] == "x-${oc.env:SECRET_THING}"


def test_show_config_does_not_reveal_a_secret_either(kdcli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_THING", "hunter2")
    out = kdcli("distill", "run.name=${oc.env:SECRET_THING}", "--cfg", "job", "--resolve").out
    assert "hunter2" not in out
    assert "${oc.env:SECRET_THING}" in out


def test_flags_may_stand_anywhere(kdcli) -> None:
    first = kdcli("distill", "--cfg", "job", "-p", "run", "+recipe=tiny", "run.steps=3").out
    last = kdcli("distill", "+recipe=tiny", "--cfg", "job", "run.steps=3", "-p", "run").out
    assert first == last
    assert yaml.safe_load(first)["steps"] == 3


def test_another_option_drops_what_the_recipe_gave_its_own() -> None:
    """tiny gives teacher.path to teacher=hf; NoTeacher takes none, and the user did not type it."""
    assert composed("+recipe=tiny", "teacher=none")["teacher"] == {"_target_": "kdcli.teacher.none.NoTeacher"}
    assert composed("+recipe=tiny", "optimizer=sgd")["optimizer"]["lr"] == 3e-3  # shared settings stay
    typed = composed("+recipe=tiny", "teacher=none", "teacher.path=x")
    assert typed["teacher"]["path"] == "x"  # typed, so it stays and is checked


def test_an_option_with_defaults_of_its_own_drops_them_too() -> None:
    """The recipe's data.path is none of `selected`, whose own data are a component in it."""
    config = composed("+recipe=tiny", "data=selected", "data.scores=x", "data.data.path=y")
    assert "path" not in config["data"]
    assert config["data"]["data"]["path"] == "y"
    assert config["data"]["keep"] == 0.5


LINEAR = {"schedule": "linear", "start": 4, "end": 1}
TYPED = "{schedule: linear, start: 4, end: 1}"


def t_of(*overrides: str) -> Any:
    return composed("+recipe=tiny", "objective@objective.kd=taid", *overrides)["objective"]["kd"]["t"]


def temperature_of(*overrides: str) -> Any:
    return composed("+recipe=tiny", *overrides)["objective"]["kd"]["temperature"]


def test_a_number_becomes_a_schedule_and_a_schedule_a_number() -> None:
    assert temperature_of(f"objective.kd.temperature={TYPED}") == LINEAR
    assert temperature_of(f"objective.kd.temperature={TYPED}", "objective.kd.temperature.end=2") == {**LINEAR, "end": 2}
    assert temperature_of(f"objective.kd.temperature={TYPED}", "objective.kd.temperature=2") == 2
    assert t_of("objective.kd.t=0.5") == 0.5
    assert t_of("objective.kd.t.alpha=0.1") == {**t_of(), "alpha": 0.1}
    assert t_of()["schedule"] == "taid"


def test_a_schedule_keeps_nothing_of_another_kind() -> None:
    """What is typed beside it stays, and is checked."""
    assert t_of(f"objective.kd.t={TYPED}") == LINEAR
    assert t_of("objective.kd.t={schedule: taid, start: 0.1}") == {"schedule": "taid", "start": 0.1}
    assert t_of("objective.kd.t={schedule: constant, value: 1}") == {"schedule": "constant", "value": 1}
    assert t_of(f"objective.kd.t={TYPED}", "+objective.kd.t.begin=0.5") == {**LINEAR, "begin": 0.5}
    assert t_of("objective.kd.t={schedule: linear, alpha: 5e-4}") == {"schedule": "linear", "alpha": 5e-4}
    assert t_of("objective.kd.t.schedule=cosine") == {"schedule": "cosine", "start": 0.4, "end": 1.0}
    assert t_of("objective.kd.t.schedule=cosine", "objective.kd.t.alpha=1")["alpha"] == 1


def test_what_is_no_schedule_is_left_to_the_checks() -> None:
    """A term that is nothing, a value that must still be given, a reference that leads nowhere."""
    assert composed("+recipe=tiny", "objective.kd=3")["objective"]["kd"] == 3
    assert temperature_of("objective.kd.temperature=???") == "???"
    assert temperature_of("objective.kd.temperature={schedule: 3}") == {"schedule": 3}
    with pytest.raises(ConfigError, match="temperature"):
        composed("+recipe=tiny", "objective.kd.temperature={schedule: linear, start: ${no.such}}")


def test_a_misspelt_setting_is_no_schedule_either() -> None:
    with pytest.raises(ConfigError, match=r"objective\.kd\.temprature: .*did you mean objective\.kd\.temperature"):
        composed("+recipe=tiny", f"objective.kd.temprature={TYPED}")


def test_a_recipe_may_choose_another_schedule_than_the_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/mine.yaml").write_text(
        "# Mine\ndefaults:\n  - tiny\n  - override /objective@objective.kd: taid\n  - _self_\n"
        "objective:\n  kd:\n    t: {schedule: epochs, values: [0.2, 0.4]}\n"
    )
    config = composed("+recipe=mine")
    assert config["objective"]["kd"]["t"] == {"schedule": "epochs", "values": [0.2, 0.4]}
    number = composed("+recipe=mine", "objective.kd.t={schedule: constant, value: 1}")
    assert number["objective"]["kd"]["t"] == {"schedule": "constant", "value": 1}


def test_objectives_are_added_swapped_and_removed_by_name() -> None:
    config = composed(
        "+recipe=quickstart",
        "objective@objective.kd=generalized_jsd",
        "objective.kd.beta=0.1",
        "~objective@objective.ce",
    )
    assert set(config["objective"]) == {"kd"}
    assert config["objective"]["kd"]["_target_"].endswith("GeneralizedJSD")
    assert config["objective"]["kd"]["beta"] == 0.1


def test_a_recipe_of_a_recipe(kdcli, tmp_path: Path) -> None:
    (tmp_path / "recipes/paper").mkdir(parents=True)
    (tmp_path / "recipes/paper/big.yaml").write_text("# Bigger\ndefaults:\n  - /recipe/tiny\nrun: {steps: 7}\n")
    config = yaml.safe_load(kdcli("distill", "+recipe=paper/big", "--cfg", "job").out)
    assert config["run"]["steps"] == 7
    assert config["teacher"]["path"] == "recipes://data/tiny_teacher"


def test_config_dir_adds_options(kdcli, tmp_path: Path) -> None:
    (tmp_path / "extra/teacher").mkdir(parents=True)
    (tmp_path / "extra/teacher/mine.yaml").write_text("_target_: kdcli.teacher.none.NoTeacher\n")
    result = kdcli("distill", "teacher=mine", "--config-dir", "extra", "--cfg", "job", "-p", "teacher")
    assert yaml.safe_load(result.out) == {"_target_": "kdcli.teacher.none.NoTeacher"}


@pytest.mark.parametrize(
    "node",
    [
        {"hydra": {"callbacks": {"x": {"_target_": "os.system"}}}},
        {"hydra": {"launcher": {"_target_": "os.system"}}},
        {"hydra": {"sweeper": {"_target_": "hydra_plugins/../os"}}},
        {"hydra": {"sweeper": {"sampler": {"_target_": "os.system"}}}},
        {"hydra": {"sweeper": {"custom_search_space": "os.system"}}},
        {"hydra": {"job": {"env_set": {"KDCLI_PLUGINS": "evil"}}}},
        {"hydra": {"job_logging": {"handlers": {"x": {"()": "os.system"}}}}},
        {"hydra": {"hydra_logging": {"formatters": {"x": {"class": "evil.Formatter"}}}}},
        {"hydra": {"help": {"_target_": "os.system"}}},
        {"teacher": {"_target_": "os.system"}},
        {"data": {"domains": [{"_target_": "pickle.loads"}]}},
        {"teacher": {"api_key": "abc"}},
    ],
)
def test_code_is_refused_wherever_it_hides(node: dict) -> None:
    with pytest.raises(ConfigError):
        refuse_code(node)


@pytest.mark.parametrize("launcher", ["basic", "joblib"])
@pytest.mark.parametrize("sweeper", ["basic", "optuna"])
def test_hydras_own_plugins_pass(launcher: str, sweeper: str) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    assert composed("+recipe=tiny", f"hydra/launcher={launcher}", f"hydra/sweeper={sweeper}")["verb"] == "distill"
