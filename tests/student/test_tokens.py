"""New tokens, frozen weights, and vocabularies that are padded differently."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from kdcli.config.cross import tokenizer_problems
from kdcli.errors import ConfigError
from kdcli.objective.forward_kl import ForwardKL
from kdcli.student.hf import HFStudent
from kdcli.text.vocabulary import share_ids
from kdcli.train.distiller import Distiller
from tests import families, toys

CPU = torch.device("cpu")
REAL = len(families.WORDS)


def settled(path: str, **settings: Any) -> HFStudent:
    student = HFStudent(path=path, **settings)
    student.check(student.architecture, student.load_tokenizer)
    student.load(CPU)
    student.settle()
    return student


@pytest.mark.parametrize("family", ["llama", "llama_tied"])
@pytest.mark.parametrize("rows", [REAL, families.ROWS])
def test_a_new_token_begins_as_the_mean_of_its_description_or_of_all(family: str, rows: int, tmp_path: Path) -> None:
    folder = families.folder(tmp_path, family, vocab_size=rows)
    before = families.model(family, vocab_size=rows)
    student = settled(folder, new_tokens={"<tool>": "w3 w5", "<end>": None})
    assert student.tokenizer("w3 <tool> <end>")["input_ids"] == [5, REAL, REAL + 1]
    assert student.head.vocab_size == REAL + 2
    assert len(student.model.get_input_embeddings().weight) == max(rows, REAL + 2)
    for old, new in (
        (before.get_input_embeddings(), student.model.get_input_embeddings()),
        (before.get_output_embeddings(), student.model.get_output_embeddings()),
    ):
        torch.testing.assert_close(new.weight[REAL], (old.weight[5] + old.weight[7]) / 2)
        torch.testing.assert_close(new.weight[REAL + 1], old.weight[:REAL].mean(0))
        assert torch.equal(new.weight[:REAL], old.weight[:REAL])
    tied = student.model.get_input_embeddings().weight is student.model.get_output_embeddings().weight
    assert tied == (family == "llama_tied")
    assert share_ids(families.tokenizer().get_vocab(), student.tokenizer.get_vocab())


def test_the_teachers_tokenizer_stays_as_it_is() -> None:
    shared, student = families.tokenizer(), HFStudent(new_tokens=["<a>"])
    prepared = student.prepared(shared)
    student.adopt(families.model("llama"), shared)
    student.settle()
    assert len(prepared) == len(student.tokenizer) == len(shared) + 1
    assert prepared.get_vocab() == student.tokenizer.get_vocab()


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["w3"], r"student\.new_tokens: w3 is a token already \(id 5\)"),
        (["<a>", "<a>"], "one stands twice"),
        ([""], "one is empty"),
        ({"<a>": ""}, "has no token; write it in words"),
    ],
)
def test_tokens_that_cannot_be_new_are_refused_without_weights(tokens: Any, message: str, tmp_path: Path) -> None:
    families.tokenizer().save_pretrained(tmp_path)

    def check() -> None:
        student = HFStudent(tokenizer=str(tmp_path), new_tokens=tokens)
        student.check(lambda: None, student.load_tokenizer)

    with pytest.raises(ConfigError, match=message):
        check()


def test_patterns_choose_what_learns_and_tied_weights_are_one(tmp_path: Path) -> None:
    folder = families.folder(tmp_path, "llama_tied")

    def learning(**settings: Any) -> set[str]:
        student = settled(folder, **settings)
        return {name for name, parameter in student.model.named_parameters() if parameter.requires_grad}

    everything = learning()
    assert learning(freeze=["lm_head.*"]) == everything - {"model.embed_tokens.weight"}
    assert learning(train=[r"re:model\.layers\.[01]\..*"], freeze=["*norm*"]) == {
        name for name in everything if name.startswith(("model.layers.0.", "model.layers.1.")) and "norm" not in name
    }
    with pytest.raises(ConfigError, match=r"student\.freeze: model\.layer\.0\.\* names no parameter; "):
        learning(freeze=["model.layer.0.*"])
    with pytest.raises(ConfigError, match=r"student\.train: re:\( is no regular expression"):
        learning(train=["re:("])


def test_padded_rows_do_not_change_the_loss() -> None:
    """Two models of one family whose embeddings are padded to 64 and to 128 rows."""
    batch = toys.batch(vocab=toys.VOCAB)

    def loss(student_rows: int, teacher_rows: int) -> torch.Tensor:
        student, teacher = (padded(toys.llama(seed), rows) for seed, rows in ((0, student_rows), (1, teacher_rows)))
        distiller = Distiller(
            toys.ToyStudent(student, toys.VOCAB), toys.ToyTeacher(teacher, toys.VOCAB), {"kd": ForwardKL()}
        )
        return distiller(batch, distiller.count(batch))[0]

    exact = loss(toys.VOCAB, toys.VOCAB)
    for rows in ((64, 128), (128, 64), (toys.VOCAB, 64)):
        torch.testing.assert_close(loss(*rows), exact)


def padded(model: Any, rows: int) -> Any:
    """The same model with rows that stand for nothing, and are far from zero."""
    model = copy.deepcopy(model)
    model.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[toys.VOCAB :] = 9.0
    return model


def test_a_permuted_vocabulary_of_the_same_size_is_another() -> None:
    own = families.tokenizer().get_vocab()
    names = list(own)
    other = own | {names[7]: own[names[8]], names[8]: own[names[7]]}
    assert len(own) == len(other)
    assert not share_ids(own, other)
    assert "2 of 40 tokens have another id" in tokenizer_problems(own, other)[0]
