"""The student's backbone, head and tokenizer."""

from pathlib import Path

import pytest
import torch

from kdcli.api import Batch
from kdcli.errors import ConfigError
from kdcli.student.hf import HFStudent
from tests import families

CPU = torch.device("cpu")
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def _batch() -> Batch:
    ids = families.ids(length=9)
    attention = torch.ones(3, 8, dtype=torch.bool)
    attention[2, 5:] = False
    return Batch(
        input_ids=ids[:, :-1],
        targets=ids[:, 1:],
        mask=attention,
        attention_mask=attention,
        segment=torch.arange(3)[:, None].expand(3, 8),
        weight=torch.ones(3),
    )


@pytest.mark.parametrize("family", list(families.FAMILIES))
def test_hidden_and_head_are_the_models_logits_and_loss_reaches_every_weight(family: str, tmp_path: Path) -> None:
    student, batch = HFStudent(path=families.folder(tmp_path, family)), _batch()
    student.load(CPU)
    logits, real = student.head(student(batch)), len(student.tokenizer)
    assert logits.shape == (3, 8, real)
    with torch.no_grad():
        expected = student.model(**batch.model_inputs()).logits[..., :real]
    torch.testing.assert_close(logits[batch.mask], expected[batch.mask])
    logits[batch.mask].logsumexp(-1).sum().backward()
    assert all(p.grad is not None for p in student.parameters())
    assert len(list(student.parameters())) == len(list(student.model.parameters()))


def test_weights_are_float32_and_trainable_by_default(tmp_path: Path) -> None:
    student = HFStudent(path=families.folder(tmp_path, dtype="bfloat16"))
    student.load(CPU)
    assert {(p.dtype, p.requires_grad) for p in student.parameters()} == {(torch.float32, True)}


def test_checking_a_config_loads_the_tokenizer_alone(tmp_path: Path) -> None:
    student = HFStudent(path=families.folder(tmp_path))
    assert len(student.load_tokenizer()) == len(families.WORDS)
    assert student.model is None


def test_a_student_without_a_path_waits_for_its_init() -> None:
    student = HFStudent()
    assert student.load_tokenizer() is None
    student.load(CPU)
    assert student.model is None


def test_another_models_tokenizer_can_be_named(tmp_path: Path) -> None:
    families.model("llama").save_pretrained(tmp_path / "bare")
    families.tokenizer().save_pretrained(tmp_path / "tokens")
    student = HFStudent(path=str(tmp_path / "bare"), tokenizer=str(tmp_path / "tokens"))
    student.load(CPU)
    assert student.head.vocab_size == len(families.WORDS)


def test_a_chat_template_is_text_or_a_file(tmp_path: Path) -> None:
    folder = families.folder(tmp_path / "model")
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    for given in (TEMPLATE, str(tmp_path / "chat.jinja")):
        tokenizer = HFStudent(path=folder, chat_template=given).load_tokenizer()
        assert tokenizer.apply_chat_template([{"role": "user", "content": "w3"}], tokenize=False) == "w3"


def test_our_chat_template_leaves_the_teachers_tokenizer_alone() -> None:
    shared = families.tokenizer()
    student = HFStudent(chat_template=TEMPLATE)
    student.load(CPU)
    student.adopt(families.model("llama"), shared)
    assert student.tokenizer.chat_template == TEMPLATE
    assert shared.chat_template is None


def test_a_missing_chat_template_is_named() -> None:
    with pytest.raises(ConfigError, match=r"student\.chat_template: no/such\.jinja is neither"):
        HFStudent(tokenizer="recipes://data/tiny_teacher", chat_template="no/such.jinja").load_tokenizer()
