"""Schedules in the section `objective`: what is refused, where, and in which words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from kdcli.api import Objective
from kdcli.command.compose import compose, hydra, plain
from kdcli.config.build import build, build_schedules, build_terms
from kdcli.config.check import check, component_problems
from kdcli.config.scheduled import refusals, takes_schedule
from kdcli.config.signature import settings
from kdcli.config.target import locate
from kdcli.errors import ConfigError
from kdcli.store import paths
from kdcli.train.schedule import Epochs, Linear, start_values

KL = "kdcli.objective.forward_kl.ForwardKL"
LINEAR = {"schedule": "linear", "start": 4, "end": 1}


@pytest.fixture(scope="module")
def tiny() -> dict[str, Any]:
    with hydra() as app:
        return plain(compose(app, "distill", ["+recipe=tiny"]), "distill")


def term(**settings: Any) -> dict[str, Any]:
    return {"_target_": KL, **settings}


def test_any_number_of_an_objective_may_change(tiny: dict[str, Any]) -> None:
    check({**tiny, "objective": {"kd": term(weight={"schedule": "epochs", "values": [1, 0]}, temperature=LINEAR)}})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"temperature": {**LINEAR, "schedule": "linar"}}, "temperature.schedule: there is no schedule linar; did you"),
        ({"temperature": {"schedule": 3}}, "temperature.schedule: there is no schedule 3; there is constant, cosine"),
        (
            {"temperature": {**LINEAR, "untl": 0.5}},
            "temperature.untl: the schedule linear has no such setting; did you",
        ),
        ({"temperature": {**LINEAR, "end": "x"}}, "temperature.end: is 'x', but must be a number"),
        ({"temperature": {**LINEAR, "end": True}}, "temperature.end: is true, but must be a number"),
        ({"temperature": {"schedule": "epochs", "values": 3}}, "temperature.values: is 3, but must be a list"),
        ({"temperature": {"schedule": "epochs", "values": [1, None]}}, "temperature.values.1: is null, but must be"),
        (
            {"temperature": {"schedule": "linear", "start": 2}},
            "temperature.end: must be given: {schedule: linear, start: …, end: …}",
        ),
        ({"temperature": {**LINEAR, "until": 2}}, "temperature: begin is 0.0 and until is 2, but they are shares"),
        ({"temperature": {"schedule": "epochs", "values": []}}, "temperature: values is empty"),
        ({"temperatur": LINEAR}, "temperatur: ForwardKL has no such setting; did you mean objective.kd.temperature?"),
        (
            {"temperature": {"start": 4, "end": 1}},
            "temperature: is {'start': 4, 'end': 1}, but must be a number, or a schedule such as {schedule: linear",
        ),
        ({"reduction": LINEAR}, "reduction: must be one of token, sequence, batch; only a setting that may be any"),
        ({"domains": LINEAR}, "domains: must be a list, each text; only a setting that may be any number"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_named(tiny: dict[str, Any], changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as error:
        check({**tiny, "objective": {"kd": term(**changes)}})
    assert f"objective.kd.{says}" in str(error.value)


@pytest.mark.parametrize(
    ("changes", "number"),
    [
        ({"temperature": {**LINEAR, "start": 0}}, "0.0"),
        ({"temperature": {**LINEAR, "end": -1}}, "-1.0"),
        ({"temperature": {"schedule": "cosine", "start": 1, "end": 0}}, "0.0"),
        ({"temperature": {"schedule": "epochs", "values": [2, 1, 0, 1]}}, "0.0"),
        ({"temperature": {"schedule": "constant", "value": -2}}, "-2.0"),
        ({"temperature": {"schedule": "taid", "start": 0}}, "0.0"),
        ({"temperature": {**LINEAR, "end": 0}, "weight": LINEAR}, "0.0"),
    ],
)
def test_a_value_that_the_constructor_refuses_is_found_before_the_run(
    tiny: dict[str, Any], changes: dict[str, Any], number: str
) -> None:
    """At the start, at the end or in between; the message names the setting and the value, once."""
    with pytest.raises(ConfigError) as error:
        check({**tiny, "objective": {"kd": term(**changes)}})
    [problem] = error.value.problems
    assert problem.startswith(f"objective.kd.temperature: ForwardKL: temperature is {number}")


def test_what_is_wrong_besides_is_not_the_schedules_fault(tiny: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as error:
        check({**tiny, "objective": {"kd": term(temperature=0, weight=LINEAR)}})
    [problem] = error.value.problems
    assert problem.startswith("objective.kd: ForwardKL: temperature is 0")


SOURCE = '''
from typing import Any

from kdcli.api import Objective
from kdcli.errors import ConfigError


class Coupled(Objective):
    """Refuses a sum of 0, in words that name neither."""

    def __init__(self, *, first: float = 1.0, second: float = 1.0, count: int = 3, **settings: Any) -> None:
        super().__init__(**settings)
        if first + second == 0:
            raise ConfigError("both cancel")
        self.first, self.second, self.count = first, second, count

    def forward(self, batch, student, teacher):
        return student.logits.sum(-1)


class Strict(Objective):
    """Keeps `sharpness` under another name."""

    def __init__(self, *, sharpness: float = 1.0, count: int = 3, maybe: float | None = None) -> None:
        super().__init__()
        self.sharp, self.count, self.maybe = sharpness, count, maybe

    def forward(self, batch, student, teacher):
        return student.logits.sum(-1)
'''


@pytest.fixture
def own(tmp_path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_losses.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("KDCLI_PLUGINS", "own_losses")
    return "own_losses"


def test_values_that_are_refused_only_together_are_found(own: str) -> None:
    node = {"_target_": f"{own}.Coupled", "first": {**LINEAR, "end": -1}, "second": {**LINEAR, "start": 2}}
    assert refusals(node, "objective.kd") == ["objective.kd.first with objective.kd.second: both cancel"]
    assert refusals({**node, "second": 2.0}, "objective.kd") == []


def test_a_setting_that_is_not_kept_cannot_change(own: str) -> None:
    node = {"_target_": f"{own}.Strict", "sharpness": LINEAR}
    [problem] = refusals(node, "objective.kd")
    assert problem.startswith("objective.kd.sharpness: Strict does not keep this setting as its attribute sharpness")


def test_only_settings_that_are_any_number_may_change(own: str) -> None:
    node = {"_target_": f"{own}.Strict", "count": LINEAR}
    [problem] = component_problems(node, "objective", "objective.kd")
    assert problem.startswith("objective.kd.count: must be a whole number; only a setting that may be any number")
    assert component_problems({**node, "count": 3, "maybe": LINEAR}, "objective", "objective.kd") == []
    assert takes_schedule(float) and takes_schedule(float | None)
    assert not any(map(takes_schedule, (int, bool, str, int | None, list[float])))


def test_schedules_of_a_class_that_takes_any_keyword_are_checked_too(own: str) -> None:
    node = {"_target_": f"{own}.Coupled", "first": {**LINEAR, "schedule": "linar"}, "whatever": 3}
    assert component_problems(node, "objective", "objective.kd") == [
        "objective.kd.first.schedule: there is no schedule linar; did you mean linear?"
    ]


def test_nothing_but_objectives_has_schedules(tiny: dict[str, Any]) -> None:
    for section, key in (("batch", "size"), ("optimizer", "lr"), ("teacher", "dtype")):
        with pytest.raises(ConfigError, match=rf"^{section}\.{key}: is "):
            check({**tiny, section: {**tiny[section], key: LINEAR}})


def test_an_objective_is_built_with_the_first_value_and_its_schedule_beside_it(monkeypatch) -> None:
    monkeypatch.setenv("HOT", "8")
    nodes = {
        "kd": term(temperature={**LINEAR, "start": "${oc.env:HOT}"}, weight=0.5),
        "off": None,
        "ce": {
            "_target_": "kdcli.objective.cross_entropy.CrossEntropy",
            "weight": {"schedule": "epochs", "values": [3]},
        },
    }
    terms, schedules = build_terms(nodes, Objective), build_schedules(nodes)
    assert (terms["kd"].temperature, terms["kd"].weight, terms["ce"].weight) == (8.0, 0.5, 3.0)
    assert {place: type(schedule) for place, schedule in schedules.items()} == {
        ("kd", "temperature"): Linear,
        ("ce", "weight"): Epochs,
    }
    with pytest.raises(ConfigError, match="there is no schedule linar"):
        build(term(temperature={"schedule": "linar"}), Objective)


OPTIONS = sorted((paths.configs() / "objective").glob("*.yaml"))


@pytest.mark.parametrize("file", OPTIONS, ids=lambda file: file.stem)
def test_every_number_of_an_objective_may_change_between_steps(file: Path) -> None:
    """Set on an objective that exists, it leaves the same object as given to the constructor: nothing is derived from
    it there and kept."""
    node = start_values(yaml.safe_load(file.read_text("utf-8")))
    known = settings(locate(node["_target_"], "objective")) or {}
    numbers = {key: node[key] for key in known if takes_schedule(known[key].annotation) and node[key] is not None}
    assert "weight" in numbers
    for key, number in numbers.items():
        assert refusals({**node, key: {"schedule": "constant", "value": number}}, "objective.kd") == []
        accepted = [objective for value in (0.3, 0.7, 2.0, 0.0, 1.0) if (objective := accepting(node, key, value))]
        assert accepted, f"{key}: tried no value that the constructor takes"
        for fresh in accepted:
            changed = build(node, Objective)
            setattr(changed, key, getattr(fresh, key))
            assert plain_attributes(changed) == plain_attributes(fresh), key


def accepting(node: dict[str, Any], key: str, value: float) -> Objective | None:
    """The objective with another value of a setting, or None where it refuses that."""
    try:
        return build({**node, key: value}, Objective) if node[key] != value else None
    except ConfigError:
        return None


def plain_attributes(objective: Objective) -> dict[str, Any]:
    return {k: v for k, v in vars(objective).items() if k not in ("_parameters", "_buffers", "_modules")}
