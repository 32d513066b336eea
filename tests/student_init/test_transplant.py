"""Rows of a new vocabulary: the old ones where tokens are the same, mixtures of old ones where not."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from kdcli.data.jsonl import Jsonl
from kdcli.errors import ConfigError
from kdcli.student.hf import HFStudent
from kdcli.student_init.transplant import Transplant, mixtures, pieces, similar, sparsemax
from kdcli.teacher.hf import HFTeacher
from kdcli.teacher.none import NoTeacher
from kdcli.text.vocabulary import token_keys
from tests import families

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {"heldout": 4, "max_length": 16}


def _words(words: list[str]) -> Any:
    known = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[pad]"))
    known.pre_tokenizer = Whitespace()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=known, eos_token="[end]", bos_token="[end]", pad_token="[pad]")


NEW = ["w7", "w12w3", "[pad]", "w3", *families.WORDS[10:], "[end]", "zebra"]


@pytest.fixture
def place(tmp_path: Path) -> str:
    _words(NEW).save_pretrained(tmp_path / "new")
    return str(tmp_path / "new")


def test_equal_tokens_and_roles_are_copied_and_others_are_the_mean_of_their_pieces(
    tmp_path: Path, place: str, data: Jsonl, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "kdcli")
    student = HFStudent(path=families.folder(tmp_path / "own"), tokenizer=place)
    init = Transplant(data=data, **SMALL)
    shape = init.shape(student, NoTeacher())
    student.load(CPU)
    old = families.model("llama")  # the same weights
    init(student, NoTeacher())
    assert shape == student.shape()
    new = student.tokenizer.get_vocab()
    was = {word: index for index, word in enumerate(families.WORDS)}
    for own, its in (
        (student.model.get_input_embeddings().weight, old.get_input_embeddings().weight),
        (student.model.lm_head.weight, old.lm_head.weight),
    ):
        assert own.shape[0] == len(NEW)
        for token in ("w3", "w7", "w37"):
            assert torch.equal(own[new[token]], its[was[token]])
        assert torch.equal(own[new["[end]"]], its[was["<eos>"]])
        assert torch.equal(own[new["[pad]"]], its[was["<pad>"]])
        torch.testing.assert_close(own[new["w12w3"]], (its[was["w12"]] + its[was["w3"]]) / 2)
        torch.testing.assert_close(own[new["zebra"]], its.mean(dim=0))
    copied = len(NEW) - 2
    share = f"student: {copied} of {len(NEW)} tokens copied ({100 * copied / len(NEW):.1f} %)"
    assert any(line.startswith(share) for line in caplog.messages)
    assert any("nats per byte ->" in line for line in caplog.messages)


def test_another_order_of_the_same_tokens_predicts_the_same(tmp_path: Path, data: Jsonl) -> None:
    words = [*families.WORDS[20:], *families.WORDS[:20]]
    known = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    known.pre_tokenizer = Whitespace()  # type: ignore[assignment]
    other = PreTrainedTokenizerFast(tokenizer_object=known, eos_token="<eos>", bos_token="<eos>", pad_token="<pad>")
    other.save_pretrained(tmp_path / "new")
    student = HFStudent(path=families.folder(tmp_path / "own"), tokenizer=str(tmp_path / "new"))
    student.load(CPU)
    Transplant(data=data, **SMALL)(student, NoTeacher())
    old = families.logits(families.model("llama"), families.ids())[..., : len(words)]
    order = torch.tensor([words.index(word) for word in families.WORDS])
    assert torch.equal(families.logits(student.model, order[families.ids()])[..., order], old)


def test_the_longest_pieces_are_taken_first() -> None:
    known: dict[Any, int] = {b"a": 0, b"ab": 1, b"abc": 2, b"c": 3, b"d": 4}
    assert pieces(b"abcd", known) == [2, 4]
    assert pieces(b"abd", known) == [1, 4]
    assert pieces(b"xax", known) == [0]
    assert pieces(b"", known) == []


def test_similar_tokens_are_those_that_the_embedding_says(tmp_path: Path, place: str, data: Jsonl) -> None:
    """The new word lies where w9 does in the teacher, so it takes w9's row of the student."""
    teacher = HFTeacher(path=families.folder(tmp_path / "teacher", vocab_size=len(NEW)))
    _words(NEW).save_pretrained(tmp_path / "teacher")
    teacher.load(CPU)
    embedding = teacher.model.get_input_embeddings().weight
    with torch.no_grad():
        embedding.copy_(torch.nn.init.orthogonal_(torch.empty(64, 64))[: len(NEW), : embedding.shape[1]])
        embedding[NEW.index("zebra")] = 3 * embedding[NEW.index("w9")]
    student = HFStudent(path=families.folder(tmp_path / "own"), tokenizer=str(tmp_path / "teacher"))
    student.load(CPU)
    old = student.model.get_input_embeddings().weight.detach().clone()
    Transplant(data=data, heuristic="similar", **SMALL)(student, teacher)
    own = student.model.get_input_embeddings().weight
    mixture, copied = mixtures(families.tokenizer(), student.tokenizer)
    expected = similar(mixture, copied, token_keys(student.tokenizer), embedding)
    zebra = NEW.index("zebra")
    assert max(zip(expected.weights[zebra], expected.ids[zebra], strict=True))[1] == families.WORDS.index("w9")
    torch.testing.assert_close(own[zebra], expected(old)[zebra])
    assert torch.equal(own[NEW.index("w3")], old[families.WORDS.index("w3")])


def test_sparsemax_is_the_nearest_distribution() -> None:
    """Against a search of all supports."""
    scores = (
        torch.randn(20, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64).sort(descending=True).values
    )
    found = sparsemax(scores)
    for row, one in zip(scores, found, strict=True):
        candidates = []
        for size in range(1, 7):
            for support in itertools.combinations(range(6), size):
                index = list(support)
                point = torch.zeros(6, dtype=torch.float64)
                point[index] = row[index] - (row[index].sum() - 1) / size
                if (point >= 0).all():
                    candidates.append(point)
        nearest = min(candidates, key=lambda point: float((point - row).square().sum()))
        torch.testing.assert_close(one, nearest)


@pytest.mark.parametrize(
    ("student", "settings", "problem"),
    [
        ({}, {}, r"student\.tokenizer names, and it names none"),
        ({"tokenizer": "own"}, {}, r"student\.tokenizer is the tokenizer that the model has"),
        (
            {"tokenizer": "new"},
            {"heuristic": "similar"},
            r"student\.tokenizer is not the teacher's",
        ),
        ({"tokenizer": "new"}, {"heldout": 40}, r"student_init\.data has 12 rows"),
    ],
)
def test_bad_settings_are_told_before_weights_load(
    student: dict[str, Any], settings: dict[str, Any], problem: str, tmp_path: Path, place: str, data: Jsonl,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    del place
    own = families.folder(tmp_path / "own")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", None)
    with pytest.raises(ConfigError, match=problem):
        Transplant(data=data, **(SMALL | settings)).shape(HFStudent(path="own", **student), HFTeacher(path=own))
