"""Layers that do not exist, and models that cannot show them, are refused before weights load."""

from __future__ import annotations

from typing import Any

import pytest

from kdcli.command.compose import compose, hydra, plain
from kdcli.config.check import check
from kdcli.errors import ConfigError
from kdcli.store import models

EAGER = ("student.attention=eager", "teacher.attention=eager")


def config(*overrides: str) -> dict[str, Any]:
    with hydra() as app:
        return plain(compose(app, "distill", ["+recipe=tiny", *overrides]), "distill")


@pytest.fixture(autouse=True)
def _weightless(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(models, "load_model", refuse)
    for place in ("teacher._hf", "student.hf"):
        monkeypatch.setattr(f"kdcli.{place}.load_model", refuse)


@pytest.mark.parametrize("name", ["hidden_mse", "hidden_cosine", "attention", "minilm", "rkd", "cka", "ted"])
def test_a_pair_of_any_shapes_is_sound(name: str) -> None:
    check(config(f"+objective@objective.it={name}", *EAGER))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["+objective@objective.it=hidden_mse", "objective.it.layers=[[7,2]]"],
            r"^objective\.it: HiddenMSE: there is no student layer 7; it has 2 \(0 is the embedding\)",
        ),
        (
            ["+objective@objective.it=cka", "objective.it.layers=[[1,9]]"],
            r"^objective\.it: CKA: there is no teacher layer 9; it has 4",
        ),
        (
            ["+objective@objective.it=hidden_mse", "objective.it.layers=[[1,2,3]]"],
            r"^objective\.it\.layers\.0: has 3 elements, but must have 2",
        ),
        (["+objective@objective.it=hidden_mse", "objective.it.layers=first"], r"^objective\.it\.layers: is 'first'"),
        (
            ["+objective@objective.it=minilm", "objective.it.heads=3"],
            r"^objective\.it: MiniLM: heads is 3, which does not divide the 128 numbers of the student's queries",
        ),
        (
            ["+objective@objective.it=ted", "objective.it.filters=no/such/run"],
            r"^objective\.it: TED: filters: no/such/run is neither a run",
        ),
        (
            ["+objective@objective.it=ted", "objective.it.stage=distill"],
            r"^objective\.it: TED: stage=distill .* train stage=filters first",
        ),
        (
            ["+objective@objective.it=attention"],
            r"teacher's attention, which HFTeacher .*; set teacher\.attention=eager and student\.attention=eager",
        ),
        (
            ["+objective@objective.it=attention", "teacher.attention=eager"],
            r"student's attention, which HFStudent .*; set teacher\.attention=eager and student\.attention=eager",
        ),
        (
            ["teacher=none", "~objective.kd", "+objective@objective.it=rkd"],
            r"teacher.s hidden.*set teacher=hf",
        ),
        (
            ["+objective@objective.it=rkd", "student_init=keep_layers", "student_init.layers=[0,9]"],
            r"^student_init\.layers: there is no layer 9",
        ),
    ],
)
def test_what_cannot_be_compared_is_named(overrides: list[str], message: str) -> None:
    extra = ["~student_init.config"] if "student_init=keep_layers" in overrides else []
    with pytest.raises(ConfigError, match=message):
        check(config(*overrides, *extra))
