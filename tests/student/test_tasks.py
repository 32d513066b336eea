"""Students and teachers that label, rewrite or encode a prompt give what transformers' own models give."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from torch import Tensor

from kdcli.api import Batch, Data, Example, Need, Student, Task
from kdcli.errors import ConfigError
from kdcli.store.tasks import task_of
from kdcli.student.classifier import ClassifierStudent
from kdcli.student.encoder import EncoderStudent
from kdcli.student.seq2seq import Seq2SeqStudent
from kdcli.teacher.classifier import ClassifierTeacher
from kdcli.teacher.encoder import EncoderTeacher
from kdcli.teacher.none import NoTeacher
from kdcli.teacher.seq2seq import Seq2SeqTeacher
from kdcli.text.collate import collate
from kdcli.text.reading import reading
from kdcli.text.tokenize import encode
from tests.encoders import ENCODERS, LABELS, WRITERS, folder, tokenizer_of

CPU = torch.device("cpu")
PROMPTS = ["the film was great", "so it is dull and poor and the road", "fine"]
PAIRS = {"bert": "the film [SEP] it was", "roberta": "the film</s></s>it was"}


class Listed(Data):
    """Examples from memory."""

    def __init__(self, *examples: Example) -> None:
        self.examples = examples

    def domains(self) -> dict[str, Iterable[Example]]:
        return {"default": self.examples}

    def fingerprint(self) -> str:
        return xxhash.xxh3_128_hexdigest(repr(self.examples).encode())


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDCLI_CACHE", str(tmp_path / "cache"))


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def loaded(student: Student) -> Any:
    task_of(student, NoTeacher())
    student.load(CPU)
    return student.eval()


def batch_of(student: Student, *examples: Example, teacher: Any = None, max_length: int = 64, **told: Any) -> Batch:
    known = reading(task_of(student, NoTeacher()), student.tokenizer, None if teacher is None else teacher.tokenizer)
    rows, _ = encode(Listed(*examples), student.tokenizer, max_length=max_length, **known, **told)
    return collate(list(rows["default"]), pad_id=student.tokenizer.pad_token_id)


def labelled(*prompts: str) -> list[Example]:
    return [Example(prompt=p, response=LABELS[i % 3], where=f"x:{i}") for i, p in enumerate(prompts)]


def own_inputs(tokenizer: Any, prompts: Iterable[str], pairs: bool = False) -> dict[str, Tensor]:
    given = dict(tokenizer(list(prompts), padding=True, return_tensors="pt"))
    return given if pairs else {key: value for key, value in given.items() if key != "token_type_ids"}


@pytest.mark.parametrize("family", list(ENCODERS))
def test_a_classifiers_logits_are_the_models_own(family: str, tmp_path: Path) -> None:
    student = loaded(ClassifierStudent(path=folder(tmp_path / "m", family)))
    batch = batch_of(student, *labelled(*PROMPTS))
    assert batch.targets[batch.mask].tolist() == [0, 1, 2]
    assert batch.mask.sum(1).tolist() == [1, 1, 1]
    hidden = student(batch)
    logits = student.head(hidden[batch.mask])
    with torch.no_grad():
        expected = student.model(**own_inputs(student.tokenizer, PROMPTS)).logits
    close(logits, expected)
    logits.logsumexp(-1).sum().backward()
    assert all(p.grad is not None for p in student.parameters())


@pytest.mark.parametrize("family", list(PAIRS))
def test_two_texts_with_a_separator_are_the_tokenizers_pair(family: str, tmp_path: Path) -> None:
    student = loaded(ClassifierStudent(path=folder(tmp_path / "m", family)))
    batch = batch_of(student, *labelled(PAIRS[family]))
    given = student.tokenizer("the film", "it was", return_tensors="pt", return_token_type_ids=True)
    ids = given["input_ids"]
    assert batch.input_ids[0, : ids.shape[1]].tolist() == ids[0].tolist()
    with torch.no_grad():
        types = {"token_type_ids": given["token_type_ids"]} if family == "bert" else {}
        expected = student.model(input_ids=ids, **types).logits
        assert family != "bert" or given["token_type_ids"].any()
        close(student.head(student(batch)[batch.mask]), expected)


def test_a_causal_classifier_reads_its_last_token(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    tokenizer = tokenizer_of("bert")
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(
        LlamaConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=len(tokenizer),
            pad_token_id=0, id2label=dict(enumerate(LABELS)), initializer_range=0.3,
        )
    )  # fmt: skip
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    student = loaded(ClassifierStudent(path=str(tmp_path)))
    batch = batch_of(student, *labelled(*PROMPTS))
    with torch.no_grad():
        expected = student.model(**own_inputs(tokenizer, PROMPTS)).logits
        close(student.head(student(batch)[batch.mask]), expected)


def test_a_classifier_shows_each_layers_state_of_the_first_token(tmp_path: Path) -> None:
    path = folder(tmp_path / "m", "bert")
    student, teacher = loaded(ClassifierStudent(path=path)), ClassifierTeacher(path=path, dtype="float32")
    teacher.load(CPU)
    batch = batch_of(student, *labelled(*PROMPTS))
    with torch.no_grad():
        states = student.states(batch, Need.HIDDEN).hidden_states
        signal = teacher.annotate(batch, Need.HIDDEN | Need.LOGITS | Need.LOGPROBS)
        whole = student.model(**own_inputs(student.tokenizer, PROMPTS), output_hidden_states=True)
    assert states is not None and signal.hidden_states is not None and len(states) == 4
    for found, again, expected in zip(states, signal.hidden_states, whole.hidden_states, strict=True):
        close(found[batch.mask], expected[:, 0])
        close(again[batch.mask], expected[:, 0])
    assert signal.logprobs is not None
    expected = whole.logits.log_softmax(-1)[range(3), [0, 1, 2]]
    close(signal.logprobs[batch.mask], expected)


def test_classifiers_of_different_tokenizers_read_the_prompt_in_their_own(tmp_path: Path) -> None:
    student = loaded(ClassifierStudent(path=folder(tmp_path / "s", "bert")))
    teacher = ClassifierTeacher(path=folder(tmp_path / "t", "roberta"), dtype="float32")
    teacher.load(CPU)
    examples = labelled(*PROMPTS)
    examples[1] = replace(examples[1], teacher_prompt="grey stone")
    batch = batch_of(student, *examples, teacher=teacher)
    signal = teacher.annotate(batch, Need.LOGITS)
    assert signal.hidden is not None and signal.head is not None
    seen = [PROMPTS[0], "grey stone", PROMPTS[2]]
    with torch.no_grad():
        expected = teacher.model(**own_inputs(teacher.tokenizer, seen)).logits
    close(signal.head(signal.hidden[batch.mask]), expected)


def test_a_long_prompt_is_cut_and_its_label_kept(tmp_path: Path) -> None:
    student = loaded(ClassifierStudent(path=folder(tmp_path / "m", "bert")))
    long = " ".join(["great"] * 60)
    batch = batch_of(student, *labelled(long, "fine"), max_length=12)
    assert batch.mask.sum(1).tolist() == [1, 1]
    assert batch.input_ids.shape[1] == 12
    ids = student.tokenizer(long, truncation=True, max_length=11)["input_ids"]
    assert batch.input_ids[0, :11].tolist() == ids
    assert student(batch).isfinite().all()
    with pytest.raises(ConfigError, match=r"batch\.max_length: BertForSequenceClassification reads at most 40 tokens"):
        student(batch_of(student, *labelled(long), max_length=50))


def test_what_is_no_label_is_named_with_its_place(tmp_path: Path) -> None:
    student = loaded(ClassifierStudent(path=folder(tmp_path / "m", "bert")))
    for example, says in (
        (Example(prompt="x", response="ugly", where="f.jsonl:7"), r"f\.jsonl:7: response is 'ugly'.*bad, good, plain"),
        (Example(prompt="x", response="Good", where="f:1"), "did you mean good"),
        (Example(text="x", where="f:2"), r"f:2: the row has text, but this student reads prompt \+ response"),
        (Example(prompt="x", chosen="a", rejected="b", where="f:3"), "a classifier learns prompt"),
    ):
        with pytest.raises(ConfigError, match=says):
            batch_of(student, example)


def test_a_new_head_is_the_same_each_time_and_a_damaged_backbone_is_refused(tmp_path: Path) -> None:
    path = folder(tmp_path / "m", "bert", auto="AutoModelForMaskedLM")
    one, two = (loaded(ClassifierStudent(path=path, labels=["no", "yes"])) for _ in range(2))
    other = loaded(ClassifierStudent(path=path, labels=["no", "yes"], seed=1))
    assert one.head.vocab_size == 2
    assert torch.equal(one.head.weight, two.head.weight)
    assert not torch.equal(one.head.weight, other.head.weight)
    assert one.model.config.id2label == {0: "no", 1: "yes"}
    config = tmp_path / "m" / "config.json"
    config.write_text(config.read_text().replace('"num_hidden_layers": 3', '"num_hidden_layers": 2'))
    with pytest.raises(ConfigError, match=r"unexpected weights: bert\.encoder\.layer\.2"):
        loaded(ClassifierStudent(path=path, labels=["no", "yes"]))
    with pytest.raises(ConfigError, match="missing weights"):
        ClassifierTeacher(path=folder(tmp_path / "h", "bert", auto="AutoModelForMaskedLM")).load(CPU)


@pytest.mark.parametrize("family", ["bert", "bart"])
def test_a_model_that_changes_its_last_layers_logits_is_refused(family: str, tmp_path: Path) -> None:
    """Hidden states and head would say something else than the model."""
    path = folder(tmp_path / "m", family)
    student = loaded(ClassifierStudent(path=path) if family == "bert" else Seq2SeqStudent(path=path))

    def capped(module: Any, given: Any, output: Any) -> Any:
        output.logits = torch.tanh(output.logits)
        return output

    student.model.register_forward_hook(capped)
    with pytest.raises(ConfigError, match="its logits are not what its last linear layer makes"):
        student(batch_of(student, *(labelled(*PROMPTS) if family == "bert" else written("good"))))


def written(*responses: str) -> list[Example]:
    return [
        Example(prompt=p, response=r, where=f"x:{i}") for i, (p, r) in enumerate(zip(PROMPTS, responses, strict=False))
    ]


@pytest.mark.parametrize("family", list(WRITERS))
def test_a_writers_logits_are_the_models_own(family: str, tmp_path: Path) -> None:
    path = folder(tmp_path / "m", family)
    student = loaded(Seq2SeqStudent(path=path))
    responses = ["good", "the road was grey", "bad and so it is"]
    batch = batch_of(student, *written(*responses))
    labels = student.tokenizer(text_target=responses, padding=True, return_tensors="pt")
    real = len(student.tokenizer)
    said = labels["attention_mask"].bool()
    assert batch.targets[batch.mask].tolist() == labels["input_ids"][said].tolist()
    hidden = student(batch)
    logits = student.head(hidden[batch.mask])
    with torch.no_grad():
        ids = labels["input_ids"]
        expected = student.model(**own_inputs(student.tokenizer, PROMPTS), labels=ids).logits[said][:, :real]
    close(logits, expected)
    assert not hidden[~batch.mask].any()
    logits.logsumexp(-1).sum().backward()
    assert all(p.grad is not None for p in student.parameters())

    teacher = Seq2SeqTeacher(path=path, dtype="float32")
    teacher.load(CPU)
    signal = teacher.annotate(batch, Need.LOGITS | Need.HIDDEN)
    assert signal.hidden is not None and signal.head is not None and signal.hidden_states is not None
    close(signal.head(signal.hidden[batch.mask]), expected)
    shape = teacher.shape()
    assert len(signal.hidden_states) == 1 + shape.layers == 4
    assert shape.width == signal.hidden_states[0].shape[-1] == 16
    assert shape.vocab_size == real


def test_a_writing_teacher_may_read_another_prompt(tmp_path: Path) -> None:
    path = folder(tmp_path / "m", "bart")
    student, teacher = loaded(Seq2SeqStudent(path=path)), Seq2SeqTeacher(path=path, dtype="float32")
    teacher.load(CPU)
    responses = ["good", "the road was grey"]
    examples = [replace(one, teacher_prompt=f"{one.prompt} and so it is") for one in written(*responses)]
    batch = batch_of(student, *examples)
    signal = teacher.annotate(batch, Need.LOGITS)
    assert signal.hidden is not None and signal.head is not None
    given = own_inputs(student.tokenizer, [f"{p} and so it is" for p in PROMPTS[:2]])
    labels = student.tokenizer(text_target=responses, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = teacher.model(**given, labels=labels["input_ids"]).logits[labels["attention_mask"].bool()]
    close(signal.head(signal.hidden[batch.mask]), expected[:, : len(student.tokenizer)])


def test_prompt_and_response_share_the_length(tmp_path: Path) -> None:
    student = loaded(Seq2SeqStudent(path=folder(tmp_path / "m", "t5")))
    long = " ".join(["great"] * 60)
    batch = batch_of(
        student,
        Example(prompt=long, response="good"),
        Example(prompt="fine", response=long),
        Example(prompt=long, response=long),
        max_length=16,
    )
    good = student.tokenizer(text_target="good")["input_ids"]
    assert batch.mask.sum(1).tolist()[0] == len(good)
    assert batch.mask.sum(1).tolist()[2] == 8
    assert batch.attention_mask.sum(1).tolist() == [16, 16, 16]
    assert batch.targets[0][batch.mask[0]].tolist() == good
    assert student(batch).isfinite().all()


def test_a_pair_of_answers_becomes_two_rows(tmp_path: Path) -> None:
    student = loaded(Seq2SeqStudent(path=folder(tmp_path / "m", "t5")))
    batch = batch_of(student, Example(prompt="fine", chosen="good", rejected="bad road"), columns={"rejected"})
    assert batch.rejected is not None and batch.rejected.tolist() == [False, True]
    assert len(batch.groups().unique()) == 1


@pytest.mark.parametrize("family", ["bert", "distilbert", "deberta-v2", "roberta"])
def test_an_encoder_shows_every_layer_at_every_token(family: str, tmp_path: Path) -> None:
    path = folder(tmp_path / "m", family)
    attention = None if family == "deberta-v2" else "eager"
    student = loaded(EncoderStudent(path=path, attention=attention))
    teacher = EncoderTeacher(path=path, dtype="float32", attention=attention)
    teacher.load(CPU)
    batch = batch_of(student, *(Example(text=text) for text in PROMPTS))
    given = own_inputs(student.tokenizer, PROMPTS)
    kept = given["attention_mask"].bool()
    assert batch.mask.sum() == kept.sum()
    needs = Need.HIDDEN | Need.RELATIONS | (Need.ATTENTION if attention else Need.NOTHING)
    with torch.no_grad():
        states, signal = student.states(batch, needs), teacher.annotate(batch, needs)
        whole = student.model(**given, output_hidden_states=True, output_attentions=attention is not None)
    assert states.bidirectional
    for both in (states, signal):
        assert both.hidden_states is not None and both.relations is not None and len(both.hidden_states) == 4
        for found, expected in zip(both.hidden_states, whole.hidden_states, strict=True):
            close(found[batch.mask], expected[kept])
        if attention:
            assert both.attentions is not None
            for found, expected in zip(both.attentions, whole.attentions, strict=True):
                size = expected.shape[-1]
                close(found[:, :, :size, :size][:, :, kept[0]], expected[:, :, kept[0]])
                assert found.shape[-1] == batch.mask.shape[1]


def test_attention_follows_from_an_encoders_queries_and_keys(tmp_path: Path) -> None:
    student = loaded(EncoderStudent(path=folder(tmp_path / "m", "bert"), attention="eager"))
    batch = batch_of(student, Example(text=PROMPTS[1]))
    with torch.no_grad():
        states = student.states(batch, Need.ATTENTION | Need.RELATIONS)
    assert states.attentions is not None and states.relations is not None
    for attention, relation in zip(states.attentions, states.relations, strict=True):
        queries, keys = relation.queries.transpose(1, 2), relation.keys.transpose(1, 2)
        scores = (queries @ keys.transpose(-1, -2) / 8**0.5)[..., :-1, :-1]  # the last place stands for nothing
        close(scores.softmax(-1), attention[..., :-1, :-1])


def test_a_long_text_is_read_in_parts(tmp_path: Path) -> None:
    student = loaded(EncoderStudent(path=folder(tmp_path / "m", "bert")))
    long = " ".join(["great fine warm"] * 10)
    plain = student.tokenizer(long, add_special_tokens=False)["input_ids"]
    batch = batch_of(student, Example(text=long), max_length=13)
    read = [row[kept].tolist() for row, kept in zip(batch.input_ids, batch.mask, strict=True)]
    assert [token for row in read for token in row[1:-1]] == plain
    assert all(len(row) <= 12 and row[0] == 2 and row[-1] == 3 for row in read)


def test_rows_that_count_nothing_give_finite_states(tmp_path: Path) -> None:
    """A rank without rows of its own scores such a batch."""
    for student in (
        loaded(ClassifierStudent(path=folder(tmp_path / "c", "bert"))),
        loaded(Seq2SeqStudent(path=folder(tmp_path / "s", "t5"))),
    ):
        batch = batch_of(student, *labelled(*PROMPTS))
        blank = replace(batch, mask=torch.zeros_like(batch.mask))
        assert not student(blank).any()


def test_labels_are_the_students_or_its_models_or_the_teachers(tmp_path: Path) -> None:
    teacher = ClassifierTeacher(path=folder(tmp_path / "t", "bert"))
    assert task_of(ClassifierStudent(), teacher) == Task(kind="classification", labels=tuple(LABELS))
    assert task_of(ClassifierStudent(path=teacher.path), NoTeacher()).labels == tuple(LABELS)
    assert task_of(ClassifierStudent(labels=["x", "y"]), teacher).labels == ("x", "y")
    with pytest.raises(ConfigError, match=r"student\.labels: which labels are there\?"):
        task_of(ClassifierStudent(), NoTeacher())
    for wrong in (["x"], ["x", "x"], ["x", ""]):
        with pytest.raises(ConfigError, match=r"student\.labels: "):
            ClassifierStudent(labels=wrong)
