"""A trimmed vocabulary writes any text, and what it kept as before, with the same predictions among what is left."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, processors, trainers
from tokenizers.pre_tokenizers import Metaspace
from transformers import PreTrainedTokenizerFast

from kdcli.api import Need
from kdcli.config.check import check
from kdcli.data.jsonl import Jsonl
from kdcli.errors import ConfigError
from kdcli.store.models import load_model, load_tokenizer, real_ids
from kdcli.student.hf import HFStudent
from kdcli.student_init._vocabulary import BytePairs
from kdcli.student_init.trim_vocabulary import TrimVocabulary
from kdcli.teacher.hf import HFTeacher
from kdcli.teacher.none import NoTeacher
from tests import families, runs

CPU = torch.device("cpu")
TINY = "recipes://data/tiny_teacher"
PROSE = Jsonl(path="recipes://data/mini/valid/prose.jsonl")  # 10 examples
ODD = [
    "",
    " ",
    "naïve café",
    "日本語 и ещё",
    "\tdef f(x):\n    return x\n",
    "🙂‍↔️",
    "a\x00b\r\n",
    "<|endoftext|>x",
    "½ ﬁ",
]


def _sentence_pieces() -> Any:
    """A tokenizer as of Llama 2: `▁` for a space, and bytes for letters that it does not know."""
    known = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    known.pre_tokenizer = Metaspace(replacement="▁", prepend_scheme="first")  # type: ignore[assignment]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    text = [example.text or "" for rows in PROSE.domains().values() for example in rows]
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=["<unk>", "<s>", "</s>", *bytes_])
    known.train_from_iterator([*text, "日本語"], trainer)
    content = json.loads(known.to_str())
    content["added_tokens"] = content["added_tokens"][:3]  # bytes are ordinary tokens
    known = Tokenizer.from_str(json.dumps(content))
    known.decoder = decoders.Sequence(  # type: ignore[assignment]
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    known.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=known, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


TOKENIZERS = {"letters": lambda: load_tokenizer(TINY), "spaces": _sentence_pieces}
EVERY = pytest.mark.parametrize("kind", list(TOKENIZERS))


def _trimmed(tokenizer: Any, some: set[int]) -> tuple[Any, list[int]]:
    pairs = BytePairs(tokenizer)
    ids = sorted(pairs.always().union(*map(pairs.with_parts, some)))
    return pairs.trimmed(ids), ids


def _text() -> list[str]:
    return [example.text or "" for rows in PROSE.domains().values() for example in rows]


@EVERY
def test_text_of_kept_tokens_has_the_same_tokens(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    text = _text()
    used = {index for ids in tokenizer(text)["input_ids"] for index in ids}
    new, ids = _trimmed(tokenizer, used)
    assert real_ids(new) == len(ids) == len(new) < len(tokenizer)
    for one in text:
        old_ids, new_ids = tokenizer(one)["input_ids"], new(one)["input_ids"]
        assert [ids[index] for index in new_ids] == old_ids
        assert new.decode(new_ids) == tokenizer.decode(old_ids)


@EVERY
def test_any_text_is_still_written(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    new, ids = _trimmed(tokenizer, set(random.Random(0).sample(range(real_ids(tokenizer)), 200)))
    for text in [*ODD, *_text()]:
        encoded = new(text, add_special_tokens=False)["input_ids"]
        assert new.decode(encoded) == tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"])
        assert tokenizer.unk_token_id is None or ids.index(tokenizer.unk_token_id) not in encoded


@EVERY
def test_every_kept_token_is_made_of_its_text(kind: str) -> None:
    """Each ordinary token that the old tokenizer makes of its own text, the new one makes too."""
    tokenizer = TOKENIZERS[kind]()
    new, ids = _trimmed(tokenizer, set(random.Random(1).sample(range(300, real_ids(tokenizer)), 100)))
    for number, old in enumerate(ids):
        text = tokenizer.decode([old])
        if tokenizer(text, add_special_tokens=False)["input_ids"] == [old]:
            assert new(text, add_special_tokens=False)["input_ids"] == [number]


@EVERY
def test_a_trimmed_tokenizer_survives_saving(kind: str, tmp_path: Path) -> None:
    tokenizer = TOKENIZERS[kind]()
    new, _ = _trimmed(tokenizer, set(range(300, 500)))
    new.save_pretrained(tmp_path)
    families.config("llama").save_pretrained(tmp_path)
    again = load_tokenizer(str(tmp_path))
    assert again.get_vocab() == new.get_vocab()
    assert again.all_special_tokens == tokenizer.all_special_tokens
    assert again.eos_token == tokenizer.eos_token
    assert [again(text)["input_ids"] for text in ODD] == [new(text)["input_ids"] for text in ODD]


def test_predictions_are_the_teachers_among_what_is_left(caplog: pytest.LogCaptureFixture) -> None:
    """p'(v) = p(v) / sum of p over kept tokens."""
    caplog.set_level("INFO", "kdcli")
    teacher, student = HFTeacher(path=TINY, dtype="float32"), HFStudent()
    init = TrimVocabulary(data=PROSE, heldout=3)
    shape, tokenizer = init.shape(student, teacher), init.load_tokenizer(student, teacher)
    teacher.load(CPU)
    student.load(CPU)
    init(student, teacher)
    assert shape == student.shape()
    assert student.tokenizer.get_vocab() == tokenizer.get_vocab()
    new, old = student.tokenizer, teacher.tokenizer
    ids = [old.get_vocab()[token] for token, _ in sorted(new.get_vocab().items(), key=lambda item: item[1])]
    text = next(text for text in _text()[::-1] if len(text) > 200)[:200]
    own = new(text, return_tensors="pt")["input_ids"]
    its = torch.tensor(ids)[own]
    with torch.no_grad():
        mine = student.model(own).logits.log_softmax(-1)
        whole = teacher.model(its).logits.log_softmax(-1)[..., ids]
    torch.testing.assert_close(mine, whole - whole.logsumexp(-1, keepdim=True), rtol=1e-5, atol=1e-5)
    assert student.head.weight is student.model.get_input_embeddings().weight
    assert student.model.config.eos_token_id == new.eos_token_id
    assert any("nats per byte ->" in line and "cut from 4 layers" in line for line in caplog.messages)


def test_untied_heads_are_cut_alike(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(TINY)
    source = families.model("llama", vocab_size=4200)
    source.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    student = HFStudent(path=str(tmp_path))
    student.load(CPU)
    before = student.model.lm_head.weight.clone()
    TrimVocabulary(data=PROSE, size=700, heldout=2)(student, NoTeacher())
    kept = [
        tokenizer.get_vocab()[token]
        for token in student.tokenizer.convert_ids_to_tokens(range(real_ids(student.tokenizer)))
    ]
    assert len(kept) <= 700
    assert torch.equal(student.model.lm_head.weight, before[kept])
    assert student.head.weight.shape[0] == len(kept)
    student.model.save_pretrained(tmp_path / "out")
    assert load_model(str(tmp_path / "out")).config.vocab_size == len(kept)


def test_size_keeps_the_most_frequent() -> None:
    teacher, student = HFTeacher(path=TINY), HFStudent()
    large, small = (
        set(init.load_tokenizer(student, teacher).get_vocab())
        for init in (TrimVocabulary(data=PROSE, size=size, heldout=2) for size in (900, 600))
    )
    assert 590 <= len(small) <= 600
    assert 890 <= len(large) <= 900
    assert {"Ġthe", "Ġof"} <= small


def test_measured_text_does_not_count(tmp_path: Path) -> None:
    """The first example alone has the word."""
    rows = [{"text": "xylophone " * 3}, {"text": "the cat sat on the mat"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    init = TrimVocabulary(data=Jsonl(path=str(tmp_path)), heldout=1)
    tokens = init.load_tokenizer(HFStudent(), HFTeacher(path=TINY)).get_vocab()
    assert "Ġthe" in tokens
    assert "phone" not in tokens


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (
            {"size": 100, "heldout": 2},
            r"student_init\.size is 100, but letters and special tokens alone",
        ),
        ({"min_count": 0}, r"student_init\.min_count is 0; give at least 1"),
        ({"heldout": 1000}, r"student_init\.heldout = 1000 examples are measured on, and none is left"),
    ],
)
def test_bad_settings_are_told_before_weights_load(
    settings: dict[str, Any], problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", None)
    with pytest.raises(ConfigError, match=problem):
        TrimVocabulary(data=PROSE, **settings).shape(HFStudent(), HFTeacher(path=TINY))


def test_other_tokenizers_are_refused(tmp_path: Path, data: Jsonl) -> None:
    teacher = HFTeacher(path=families.folder(tmp_path / "teacher"))
    with pytest.raises(ConfigError, match=r"takes byte-pair tokenizers .* is WordLevel"):
        TrimVocabulary(data=data, heldout=4).shape(HFStudent(), teacher)


def test_an_objective_for_one_tokenizer_is_told_before_weights_load(tmp_path: Path) -> None:
    """The student's tokenizer is not the teacher's any more."""
    init = {
        "_target_": "kdcli.student_init.trim_vocabulary.TrimVocabulary",
        "data": {"_target_": "kdcli.data.jsonl.Jsonl", "path": "recipes://data/mini/valid/prose.jsonl"},
        "heldout": 2,
    }
    runs.write_run(tmp_path)
    config = runs.config(data__path=str(tmp_path / "data"), run__dir=str(tmp_path / "run"), student_init=init)
    with pytest.raises(ConfigError, match=r"its tokenizer is not the teacher's.*objective\.kd \(ForwardKL\)"):
        check(config)
    assert Need.LOGITS in HFTeacher(path=TINY).provides
