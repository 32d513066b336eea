"""A new model: the architecture asked for, the tokenizer's vocabulary, and weights that only the seed decides."""

from pathlib import Path
from typing import Any

import pytest
import torch

from kdcli.errors import ConfigError
from kdcli.store.models import load_model
from kdcli.student.hf import HFStudent
from kdcli.student_init.from_config import FromConfig
from kdcli.teacher.hf import HFTeacher
from kdcli.teacher.none import NoTeacher
from tests import families

CPU = torch.device("cpu")
SMALL = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


@pytest.fixture
def source(tmp_path: Path) -> str:
    return families.folder(tmp_path / "source", "qwen3")


def _student(source: str, **settings: Any) -> HFStudent:
    student = HFStudent(tokenizer=source, dtype=settings.pop("dtype", "float32"))
    student.load(CPU)
    FromConfig(**settings)(student, NoTeacher())
    return student


def _same(first: HFStudent, second: HFStudent) -> bool:
    pairs = zip(first.model.parameters(), second.model.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_vocabulary_and_special_ids_are_the_tokenizers(source: str) -> None:
    student = _student(source, config=SMALL)
    config = student.model.config
    assert (config.vocab_size, config.bos_token_id, config.eos_token_id, config.pad_token_id) == (40, 0, 0, 1)
    assert student.head.vocab_size == 40


def test_a_larger_vocabulary_is_padding(source: str) -> None:
    student = _student(source, config=SMALL | {"vocab_size": 64})
    assert student.head.weight.shape[0] == 64
    assert student.head.vocab_size == 40


def test_the_seed_alone_decides_the_weights(source: str) -> None:
    torch.manual_seed(5)
    first = _student(source, config=SMALL, seed=3)
    torch.manual_seed(6)
    torch.rand(7)
    state = torch.get_rng_state()
    again = _student(source, config=SMALL, seed=3)
    assert torch.equal(state, torch.get_rng_state())
    assert _same(first, again)
    assert not _same(first, _student(source, config=SMALL, seed=4))


@pytest.mark.parametrize("family", list(families.FAMILIES))
def test_every_family_trains_and_survives_saving(family: str, source: str, tmp_path: Path) -> None:
    kind = families.FAMILIES[family] | {"model_type": families.FAMILIES[family].get("model_type", family)}
    student = _student(source, config=kind)
    student.model.eval()
    student.model.save_pretrained(tmp_path / "saved")
    ids = families.ids()
    again = load_model(str(tmp_path / "saved"))
    assert torch.equal(families.logits(again, ids), families.logits(student.model, ids))
    student.model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in student.model.parameters())


def test_a_models_config_can_be_taken_and_changed(source: str) -> None:
    student = _student(source, config=source, overrides={"num_hidden_layers": 2})
    assert student.model.config.model_type == "qwen3"
    assert student.model.config.num_hidden_layers == 2
    assert student.model.config.hidden_size == 32
    assert student.model.config.vocab_size == 40


def test_weights_have_the_students_dtype(source: str) -> None:
    student = _student(source, config=SMALL, dtype="bfloat16")
    assert {p.dtype for p in student.model.parameters()} == {torch.bfloat16}


def test_the_teachers_tokenizer_is_the_default(source: str) -> None:
    teacher, student = HFTeacher(path=source), HFStudent()
    student.load(CPU)
    FromConfig(config=SMALL)(student, teacher)
    assert student.tokenizer is teacher.tokenizer


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"config": SMALL | {"hiden_size": 3}}, r"config\.hiden_size: llama models .*did you mean hidden_size\?"),
        ({"config": SMALL, "overrides": {"num_layer": 3}}, r"overrides\.num_layer: .*did you mean num_\w+\?"),
        ({"config": SMALL | {"model_type": "lama"}}, r"model_type: 'lama' is no architecture .*did you mean llama\?"),
        ({"config": {"hidden_size": 16}}, r"model_type: None is no architecture"),
        ({"config": SMALL | {"vocab_size": 39}}, r"vocab_size is 39, but the tokenizer has 40 ids"),
        ({"config": SMALL | {"num_attention_heads": 3}}, r"student_init\.config: "),
        ({"config": "no/such/model"}, "no/such/model: no such model"),
    ],
)
def test_a_wrong_config_is_named(settings: dict[str, Any], message: str, source: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _student(source, **settings)


def test_no_tokenizer_anywhere_is_an_error() -> None:
    student = HFStudent()
    student.load(CPU)
    with pytest.raises(ConfigError, match=r"set student\.tokenizer"):
        FromConfig(config=SMALL)(student, NoTeacher())
