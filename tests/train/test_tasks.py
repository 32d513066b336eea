"""Classifiers, encoder-decoders and encoders learn in whole runs, resume, and are exported as what they are."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from transformers import AutoTokenizer

from kdcli.api import Need, Objective, TaskKind
from kdcli.config.build import build
from kdcli.config.tasks import refusal
from kdcli.store import metrics, paths
from kdcli.student.classifier import ClassifierStudent
from kdcli.student.encoder import EncoderStudent
from kdcli.student.seq2seq import Seq2SeqStudent
from kdcli.teacher.classifier import ClassifierTeacher
from kdcli.teacher.encoder import EncoderTeacher
from kdcli.teacher.seq2seq import Seq2SeqTeacher
from kdcli.train.distiller import Distiller
from tests import runs
from tests.encoders import LABELS, WORDS, folder
from tests.student.test_tasks import PROMPTS, batch_of, labelled, loaded, written

TERM = "kdcli.objective."


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDCLI_CACHE", str(tmp_path / "cache"))


def rows(folder: Path) -> Path:
    """Prompts whose words tell the label."""
    folder.mkdir(parents=True, exist_ok=True)
    words = [(word, label) for label, text in WORDS.items() for word in text.split()]
    for domain in ("film", "road"):
        lines = [{"prompt": f"the {domain} was {word} and so it is", "response": label} for word, label in words]
        (folder / f"{domain}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def trained(model: Any, tokenizer: Any, data: Path) -> float:
    """A teacher worth learning from: the model fitted to the rows with plain PyTorch; its accuracy."""
    given = [json.loads(line) for file in sorted(data.glob("*.jsonl")) for line in file.read_text().splitlines()]
    inputs = dict(tokenizer([row["prompt"] for row in given], padding=True, return_tensors="pt"))
    inputs.pop("token_type_ids", None)
    labels = torch.tensor([LABELS.index(row["response"]) for row in given])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.005)
    for _ in range(150):
        loss = torch.nn.functional.cross_entropy(model(**inputs).logits, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return float((model.eval()(**inputs).logits.argmax(-1) == labels).float().mean())


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A BERT of three layers that knows the labels."""
    path = tmp_path_factory.mktemp("teacher")
    folder(path / "model", "bert", initializer_range=0.1)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(path / "model")
    tokenizer = AutoTokenizer.from_pretrained(path / "model")
    torch.manual_seed(0)
    assert trained(model, tokenizer, rows(path / "data")) == 1.0
    model.save_pretrained(path / "model")
    return str(path / "model")


def accuracy(data: Path) -> dict[str, Any]:
    jsonl = {"_target_": "kdcli.data.jsonl.Jsonl", "path": str(data)}
    return {"accuracy": {"_target_": "kdcli.evaluation.accuracy.Accuracy", "data": jsonl, "max_length": 32}}


def classifying(tmp_path: Path, knowing: str, **changes: Any) -> Path:
    data = rows(tmp_path / "data")
    begin = {"_target_": "kdcli.student_init.keep_layers.KeepLayers", "layers": [0, 2]}
    objective = {
        "kd": {"_target_": TERM + "forward_kl.ForwardKL"},
        "ce": {"_target_": TERM + "cross_entropy.CrossEntropy"},
        "pkd": {"_target_": TERM + "hidden_mse.HiddenMSE", "normalize": "unit"},
    }
    settings: dict[str, Any] = {
        "teacher": {"_target_": "kdcli.teacher.classifier.ClassifierTeacher", "path": knowing, "dtype": "float32"},
        "student": {"_target_": "kdcli.student.classifier.ClassifierStudent"},
        "student_init": begin,
        "objective": objective,
        "evaluation": accuracy(data),
        "run__steps": 6,
    }
    return runs.write_run(tmp_path, **(settings | changes))


def told(run_dir: Path, key: str) -> list[float]:
    """A metric of each line that has it."""
    return [line[key] for line in metrics.read(run_dir) if key in line]


def test_a_classifier_learns_resumes_and_is_exported_as_one(tmp_path: Path, teacher: str) -> None:
    scratch = {
        "_target_": "kdcli.student_init.from_config.FromConfig",
        "config": {
            "model_type": "distilbert", "dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2, "dropout": 0.1,
            "max_position_embeddings": 40, "initializer_range": 0.1,
        },
    }  # fmt: skip
    changes = {
        "student_init": scratch,
        "run__steps": 60,
        "run__save_every": 30,
        "lr_schedule__num_training_steps": 90,
        "batch__size": 8,
        "batch__micro_size": 8,
    }
    run_dir = classifying(tmp_path, teacher, **changes)
    assert runs.work(run_dir) == [0]
    assert told(run_dir, "eval/accuracy/all/teacher_accuracy")[0] == 1.0
    assert told(run_dir, "eval/accuracy/all/targets")[0] == 18
    shares, losses = told(run_dir, "eval/accuracy/all/accuracy"), told(run_dir, "loss/kd")
    assert shares[0] <= 0.5 < 0.9 <= shares[-1]
    assert losses[-1] < losses[0]

    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        run_dir / "student", dtype=torch.float32
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "student")
    assert type(model).__name__ == "DistilBertForSequenceClassification"
    assert model.config.id2label == dict(enumerate(LABELS))
    student = loaded(ClassifierStudent(path=str(run_dir / "student")))
    batch = batch_of(student, *labelled(*PROMPTS))
    with torch.no_grad():
        inputs = dict(tokenizer(PROMPTS, padding=True, return_tensors="pt"))
        expected = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        torch.testing.assert_close(student.head(student(batch)[batch.mask]), expected, rtol=1e-5, atol=1e-5)
    card = (run_dir / "student" / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card
    assert "AutoModelForSequenceClassification.from_pretrained" in card

    again = classifying(tmp_path / "again", teacher, **changes)
    assert runs.work(again, fault="step.optim:step=33:kill") == [None]
    assert runs.work(again) == [0]
    assert runs.lines(again)[-1] == runs.lines(run_dir)[-1]


def test_a_classifier_cut_from_its_teacher_begins_with_its_head(tmp_path: Path, teacher: str) -> None:
    run_dir = classifying(tmp_path, teacher, student_init__layers=[0, 1, 2])
    assert runs.work(run_dir, ranks=2) == [0, 0]
    assert told(run_dir, "eval/accuracy/all/accuracy")[0] == 1.0
    assert told(run_dir, "eval/accuracy/all/teacher_accuracy")[0] == 1.0


def test_a_run_of_labels_in_zero3(tmp_path: Path, teacher: str) -> None:
    losses = []
    for stage in (0, 3):
        run_dir = classifying(tmp_path / str(stage), teacher, engine__stage=stage)
        assert runs.work(run_dir) == [0]
        losses.append(told(run_dir, "loss/ce"))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_writer_learns_and_is_exported_as_one(tmp_path: Path) -> None:
    data, path = rows(tmp_path / "data"), folder(tmp_path / "model", "t5")
    run_dir = runs.write_run(
        tmp_path,
        teacher={"_target_": "kdcli.teacher.seq2seq.Seq2SeqTeacher", "path": path, "dtype": "float32"},
        student={"_target_": "kdcli.student.seq2seq.Seq2SeqStudent"},
        student_init__config={
            "model_type": "t5", "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2,
            "dropout_rate": 0.1,
        },
        objective={
            "kd": {"_target_": TERM + "forward_kl.ForwardKL"},
            "ce": {"_target_": TERM + "cross_entropy.CrossEntropy"},
        },
        evaluation=accuracy(data),
        run__steps=16,
    )  # fmt: skip
    assert runs.work(run_dir) == [0]
    losses, shares = told(run_dir, "loss/ce"), told(run_dir, "eval/accuracy/all/accuracy")
    assert losses[-1] < 0.8 * losses[0]
    assert shares[-1] > shares[0]
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(run_dir / "student", dtype=torch.float32).eval()
    student = loaded(Seq2SeqStudent(path=str(run_dir / "student")))
    batch = batch_of(student, *written("good", "bad", "plain")[:1])
    given = student.tokenizer([PROMPTS[0]], return_tensors="pt")
    labels = student.tokenizer(text_target=["good"], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = model(input_ids=given["input_ids"], labels=labels).logits[0, :, : len(student.tokenizer)]
        torch.testing.assert_close(student.head(student(batch)[batch.mask]), expected, rtol=1e-5, atol=1e-5)
    assert "AutoModelForSeq2SeqLM.from_pretrained" in (run_dir / "student" / "README.md").read_text()


def test_an_encoder_learns_its_teachers_layers_and_becomes_a_classifier(tmp_path: Path, teacher: str) -> None:
    """TinyBERT's two stages: all tokens' states, attention and relations, then the labels."""
    rows(tmp_path / "data")
    eager = {"path": teacher, "attention": "eager"}
    run_dir = classifying(
        tmp_path,
        teacher,
        teacher={"_target_": "kdcli.teacher.encoder.EncoderTeacher", "dtype": "float32", **eager},
        student={"_target_": "kdcli.student.encoder.EncoderStudent", "attention": "eager"},
        objective={
            "hidden": {"_target_": TERM + "hidden_mse.HiddenMSE"},
            "attention": {"_target_": TERM + "attention.Attention", "weight": 10.0},
            "minilm": {"_target_": TERM + "minilm.MiniLM"},
        },
        evaluation={},
        run__steps=30,
        lr_schedule__num_training_steps=40,
    )
    assert runs.work(run_dir) == [0]
    for term in ("hidden", "attention", "minilm"):
        losses = told(run_dir, f"loss/{term}")
        assert sum(losses[-5:]) < 0.9 * sum(losses[:5]), term
    second = ClassifierStudent(path=str(run_dir / "student"), labels=LABELS)
    assert loaded(second).head.vocab_size == 3
    encoder = transformers.AutoModel.from_pretrained(run_dir / "student", dtype=torch.float32)
    torch.testing.assert_close(
        second.model.bert.encoder.layer[1].output.dense.weight, encoder.encoder.layer[1].output.dense.weight
    )


# ------------------------------------------------------------------------------------- every objective, every task


@cache
def options() -> dict[str, dict[str, Any]]:
    files = sorted((paths.configs() / "objective").glob("*.yaml"))
    return {file.stem: yaml.safe_load(file.read_text()) for file in files}


def objective(name: str) -> Objective:
    return build(options()[name], Objective)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[TaskKind, tuple[Any, Any]]:
    """Per task a student and a teacher of other weights and more layers."""
    made: dict[TaskKind, tuple[Any, Any]] = {}
    root = tmp_path_factory.mktemp("models")
    kinds: dict[TaskKind, tuple[str, Any, Any]] = {
        "classification": ("bert", ClassifierStudent, ClassifierTeacher),
        "seq2seq": ("t5", Seq2SeqStudent, Seq2SeqTeacher),
        "encoding": ("bert", EncoderStudent, EncoderTeacher),
    }
    for kind, (family, student, teacher) in kinds.items():
        layers = "num_decoder_layers" if family == "t5" else "num_hidden_layers"
        small, large = (folder(root / f"{kind}{seed}", family, None, seed, **{layers: 2 + seed}) for seed in (0, 1))
        one, other = student(path=small, attention="eager"), teacher(path=large, dtype="float32", attention="eager")
        other.load(torch.device("cpu"))
        made[kind] = (loaded(one), other)
    return made


@pytest.mark.parametrize("name", list(options()))
@pytest.mark.parametrize("kind", ["classification", "seq2seq", "encoding"])
def test_what_is_not_refused_trains(name: str, kind: TaskKind, models: dict[TaskKind, tuple[Any, Any]]) -> None:
    term = objective(name)
    if refusal(term, kind) is not None:
        return
    student, teacher = models[kind]
    assert not term.needs & ~(teacher.provides | Need.REFERENCE), "what a task does not refuse, its teacher provides"
    examples = labelled(*PROMPTS) if kind != "seq2seq" else written("good", "the road was grey", "bad and so it is")
    batch = batch_of(student, *examples, columns=term.columns & {"rejected", "group"}) if not term.columns else None
    if batch is None:
        return  # rows of pairs and groups: tests/objective
    distiller = Distiller(student, teacher, {"kd": term})
    loss, told = distiller(batch, distiller.count(batch))
    loss.backward()
    assert loss.isfinite()
    assert told["loss/kd"] != 0
    if not getattr(term, "stops_gradient", False):
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in student.parameters())
    student.zero_grad()


def test_a_loss_that_no_task_refuses_exists_for_each() -> None:
    kinds: tuple[TaskKind, ...] = ("classification", "seq2seq", "encoding")
    found = {kind: {name for name in options() if refusal(objective(name), kind) is None} for kind in kinds}
    assert {"cross_entropy", "forward_kl", "hinton", "dkd", "logit_mse"} <= found["classification"]
    assert found["encoding"] == {"hidden_mse", "hidden_cosine", "attention", "minilm", "rkd", "cka"}
    assert {"dpo", "step_by_step", "forward_kl", "rkd"} <= found["seq2seq"]
    for name in ("uld", "minilm", "contrastive"):
        assert name not in found["classification"] | found["seq2seq"]
