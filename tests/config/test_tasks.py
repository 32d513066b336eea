"""What makes no sense for a classifier, an encoder-decoder or an encoder is refused before weights load."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from kdcli.config import check, tasks
from kdcli.errors import ConfigError
from kdcli.student.classifier import ClassifierStudent
from kdcli.teacher.none import NoTeacher
from tests import runs
from tests.encoders import LABELS, folder

STUDENT = {
    "classifier": "kdcli.student.classifier.ClassifierStudent",
    "seq2seq": "kdcli.student.seq2seq.Seq2SeqStudent",
    "encoder": "kdcli.student.encoder.EncoderStudent",
    "hf": "kdcli.student.hf.HFStudent",
}
TEACHER = {name: target.replace("student", "teacher").replace("Student", "Teacher") for name, target in STUDENT.items()}
PRETRAINED = {"_target_": "kdcli.student_init.pretrained.Pretrained"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    return {
        "classifier": folder(root / "bert", "bert"),
        "encoder": folder(root / "encoder", "bert"),
        "other": folder(root / "roberta", "roberta"),
        "seq2seq": folder(root / "t5", "t5"),
        "bart": folder(root / "bart", "bart"),
        "unnamed": folder(root / "unnamed", "bert", id2label={0: "LABEL_0", 1: "LABEL_1"}, label2id=None),
        "hf": "recipes://data/tiny_teacher",
    }


def term(path: str) -> dict[str, Any]:
    return {"kd": {"_target_": f"kdcli.objective.{path}"}}


def problems(tmp_path: Path, models: dict[str, str], kind: str, of: str = "", **changes: Any) -> list[str]:
    """Of a distillation of `kind` from a teacher of kind `of`, with some settings changed."""
    data = tmp_path / "data"
    data.mkdir(exist_ok=True)
    if not (data / "a.jsonl").exists():
        (data / "a.jsonl").write_text(json.dumps({"prompt": "the film was great", "response": "good"}) + "\n")
    of = of or kind
    needs = {"encoder": "hidden_mse.HiddenMSE"}.get(kind, "forward_kl.ForwardKL")
    settings: dict[str, Any] = {
        "data__path": str(data),
        "run__dir": str(tmp_path / "run"),
        "teacher": {"_target_": TEACHER[of.split(":")[0]], "path": models[of.split(":")[-1]]},
        "student": {"_target_": STUDENT[kind], "path": models[kind]},
        "student_init": PRETRAINED,
        "objective": term(needs),
    }
    try:
        check.check(runs.config(**(settings | changes)))
    except ConfigError as error:
        return list(error.problems)
    return []


@pytest.mark.parametrize("kind", ["classifier", "seq2seq", "encoder"])
def test_what_makes_sense_is_accepted(kind: str, tmp_path: Path, models: dict[str, str]) -> None:
    assert problems(tmp_path, models, kind) == []


def test_classifiers_of_other_tokenizers_are_accepted(tmp_path: Path, models: dict[str, str]) -> None:
    assert problems(tmp_path, models, "classifier", "classifier:other") == []


CASES = [
    ("hf", "classifier", {}, "teacher=classifier does not teach student=hf"),
    ("classifier", "hf", {}, "set teacher=classifier, or student=hf, or teacher=none"),
    ("classifier", "classifier", {"objective": term("uld.ULD")}, r"ULD compares different tokenizers.*such as .*dkd"),
    ("classifier", "classifier", {"objective": term("dpo.DPO")}, "DPO compares whole answers, and a label is one"),
    ("classifier", "classifier", {"objective": term("rkd.RKD")}, "RKD compares the targets of a sequence"),
    ("classifier", "classifier", {"objective": term("minilm.MiniLM")}, "MiniLM compares every position"),
    ("seq2seq", "seq2seq", {"objective": term("attention.Attention")}, "Attention compares every position"),
    ("seq2seq", "seq2seq", {"objective": term("contrastive.Contrastive")}, "Contrastive reads states of the whole"),
    (
        "encoder", "encoder", {"objective": term("forward_kl.ForwardKL")},
        "ForwardKL needs predictions.*such as cka, hidden_cosine, hidden_mse, minilm or rkd",
    ),
    ("seq2seq", "seq2seq:bart", {}, "its tokenizer is not the teacher's"),
    ("classifier", "classifier", {"batch__packing": True}, "rows of student=classifier are not packed"),
    (
        "seq2seq", "seq2seq",
        {"student_init": {"_target_": "kdcli.student_init.keep_layers.KeepLayers", "layers": [0]}},
        "keep_layers does not know which of encoder and decoder",
    ),
    ("encoder", "encoder", {"evaluation": runs.heldout(Path("."))}, "Heldout measures predictions"),
    (
        "encoder", "encoder", {"domain_scheduler": {"_target_": "kdcli.domain_scheduler.ddk.DDK"}},
        "DDK measures predictions",
    ),
    ("classifier", "classifier:unnamed", {}, "3 labels, but the teacher has 2 classes"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "of", "changes", "says"), CASES, ids=lambda value: value if value else "none")
def test_what_makes_no_sense_is_named_with_a_way_out(
    kind: str, of: str, changes: dict[str, Any], says: str, tmp_path: Path, models: dict[str, str]
) -> None:
    found = problems(tmp_path, models, kind, of, **changes)
    with pytest.raises(AssertionError, match=says):
        raise AssertionError("; ".join(found))
    assert len(found) == 1


def test_a_cache_is_of_language_models(models: dict[str, str]) -> None:
    student = ClassifierStudent(path=models["classifier"])
    (one,) = tasks.problems_in({"verb": "cache"}, {"student": student, "teacher": NoTeacher()})
    assert "a cache holds what language models say, and student=classifier is none" in one


def test_labels_agree_by_name_and_order(tmp_path: Path, models: dict[str, str]) -> None:
    student = {"_target_": STUDENT["classifier"], "path": models["classifier"], "labels": LABELS[::-1]}
    (one,) = problems(tmp_path, models, "classifier", student=student)
    assert one.startswith(
        "student.labels: the student's are plain, good, bad, and the teacher has them in another order"
    )
    assert "set student.labels=[bad,good,plain]" in one
    teacher = {"_target_": TEACHER["classifier"], "path": models["classifier"], "labels": ["schlecht", "gut", "grau"]}
    (two,) = problems(tmp_path, models, "classifier", teacher=teacher)
    assert "the teacher has others: schlecht, gut, grau" in two


def test_rows_that_a_task_cannot_use_are_named_at_once(tmp_path: Path, models: dict[str, str]) -> None:
    (tmp_path / "data").mkdir()
    rows = [{"prompt": "x", "response": "good"}, {"prompt": "x", "response": "lovely"}, {"text": "y"}]
    (tmp_path / "data/a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = problems(tmp_path, models, "classifier")
    assert [p.split(": ", 1)[0].rpartition("/")[2] for p in found] == ["a.jsonl:2", "a.jsonl:3"]
    assert found[0].endswith("response is 'lovely', which is no label; the labels are bad, good, plain")
    assert "this student reads prompt + response (the label's name)" in found[1]
    data = {"_target_": "kdcli.data.jsonl.Jsonl", "path": str(tmp_path / "data"), "max_bad_fraction": 0.9}
    assert problems(tmp_path, models, "classifier", data=data) == []


def test_the_page_says_what_the_check_does() -> None:
    page = Path(__file__).parents[2] / "docs/encoders"
    written = page.with_suffix(".md").read_text("utf-8")
    assert runpy.run_path(str(page.with_suffix(".py")))["page"](written) == written, "run `make docs`"
