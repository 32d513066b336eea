"""One line per example: equal to a plain computation, whatever the micro-batches and ranks."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch.nn.functional import cross_entropy

from kdcli.api import Batch, Scores
from kdcli.errors import ConfigError
from kdcli.evaluation.row_scores import RowScores
from kdcli.store.examples import content_key
from kdcli.teacher.none import NoTeacher
from kdcli.train.distiller import Distiller
from tests import families, toys
from tests.evaluation.test_heldout import REAL, TOKENIZER, Words


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDCLI_CACHE", str(tmp_path / "cache"))


class Ranks:
    """Threads that take part in one evaluation: what they add up is the sum of what each gives."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size)
        self.given: dict[int, Mapping[str, float]] = {}

    def sum(self, rank: int, values: Mapping[str, float]) -> dict[str, float]:
        self.given[rank] = values
        self.barrier.wait(20)
        keys = {tuple(each) for each in self.given.values()}
        assert len(keys) == 1, "ranks add up different keys"
        total = {key: math.fsum(each[key] for each in self.given.values()) for key in values}
        self.barrier.wait(20)
        return total


class Subject:
    tokenizer = TOKENIZER
    reading: ClassVar[dict[str, Any]] = {}

    def __init__(self, folder: Path, *, ranks: Ranks | None = None, rank: int = 0, teacher: Any = None) -> None:
        student = toys.ToyStudent(families.model("llama", seed=1), REAL)
        teacher = teacher or toys.ToyTeacher(families.model("llama", seed=2), REAL)
        self.distiller = Distiller(student, teacher, {}).eval()
        self.folder, self.rank, self.ranks = folder, rank, ranks or Ranks(1)
        self.world_size = self.ranks.size
        self.calls = 0

    def score(self, batch: Batch) -> Scores:
        self.calls += 1
        return self.distiller(batch, mode="score")

    def sum(self, values: Mapping[str, float]) -> dict[str, float]:
        return self.ranks.sum(self.rank, values)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "row_scores.jsonl").read_text().splitlines()]


def test_lines_equal_a_plain_computation_of_each_whole_document(tmp_path: Path) -> None:
    """Documents are split at 10 tokens and count whole: parts overlap by a token, each reads only its own."""
    data = Words(prose=5, code=3)
    metrics = RowScores(data=data, max_length=10, micro_size=3)(Subject(tmp_path), 0)
    documents = [(name, example) for name, part in data.domains().items() for example in part]
    found = lines(tmp_path)
    assert [(line["domain"], line["key"]) for line in found] == [(name, content_key(e)) for name, e in documents]
    models = [families.model("llama", seed=seed) for seed in (1, 2)]
    for line, (_, example) in zip(found, documents, strict=True):
        ids = torch.tensor([*TOKENIZER(example.text).input_ids, 0])
        parts = [ids[start : start + 10] for start in range(0, max(1, len(ids) - 1), 9)]
        nats = [
            sum(
                float(cross_entropy(families.logits(m, part[None])[0, :-1, :REAL], part[1:], reduction="sum"))
                for part in parts
            )
            for m in models
        ]
        assert line["tokens"] == len(ids) - 1
        assert [line["student"], line["teacher"]] == pytest.approx(nats, rel=1e-4)
        assert line["difference"] == pytest.approx(nats[0] - nats[1], abs=1e-3)
    assert metrics["all/rows"] == 8
    total = sum(line["difference"] for line in found) / sum(line["tokens"] for line in found)
    assert metrics["all/difference"] == pytest.approx(total)


@pytest.mark.parametrize(("world_size", "micro_size"), [(2, 2), (3, 1), (4, 5)])
def test_ranks_write_what_one_writes_and_score_equally_often(tmp_path: Path, world_size: int, micro_size: int) -> None:
    data = Words(a=7, b=2)
    alone = RowScores(data=data, max_length=12, micro_size=2)(Subject(tmp_path), 0)
    expected = lines(tmp_path)
    folder = tmp_path / "several"
    folder.mkdir()
    ranks = Ranks(world_size)
    subjects = [Subject(folder, ranks=ranks, rank=rank) for rank in range(world_size)]
    results: dict[int, Any] = {}
    scores = RowScores(data=data, max_length=12, micro_size=micro_size)
    threads = [
        threading.Thread(target=lambda r=r: results.update({r: scores(subjects[r], 0)})) for r in range(world_size)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len({subject.calls for subject in subjects}) == 1
    assert [results[rank] for rank in range(world_size)] == [results[0]] * world_size
    assert results[0] == pytest.approx(alone, rel=1e-5)
    for line, other in zip(lines(folder), expected, strict=True):
        assert (line["key"], line["domain"], line["tokens"]) == (other["key"], other["domain"], other["tokens"])
        assert line["student"] == pytest.approx(other["student"], rel=1e-4)
        assert line["teacher"] == pytest.approx(other["teacher"], rel=1e-4)


def test_without_a_teacher_there_is_no_difference(tmp_path: Path) -> None:
    metrics = RowScores(data=Words(a=2), max_length=12)(Subject(tmp_path, teacher=NoTeacher()), 0)
    assert metrics.keys() == {"a/rows", "a/student", "all/rows", "all/student"}
    assert {line["difference"] for line in lines(tmp_path)} == {None}


def test_an_evaluation_that_is_stopped_leaves_the_file_of_before(tmp_path: Path) -> None:
    scores = RowScores(data=Words(a=6), max_length=12, micro_size=2)
    scores(Subject(tmp_path), 0)
    before = (tmp_path / "row_scores.jsonl").read_text()

    class Stopped(Subject):
        def score(self, batch: Batch) -> Scores:
            if self.calls == 2:
                raise KeyboardInterrupt
            return super().score(batch)

    with pytest.raises(KeyboardInterrupt):
        scores(Stopped(tmp_path), 1)
    assert (tmp_path / "row_scores.jsonl").read_text() == before
    assert [file.name for file in tmp_path.iterdir() if file.name.endswith(".tmp")] == []


@pytest.mark.parametrize("settings", [{"file": "a/b.jsonl"}, {"micro_size": 0}, {"max_length": 1}])
def test_wrong_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        RowScores(data=Words(a=1), **settings)


@pytest.mark.slow
def test_scores_of_one_command_select_the_rows_of_the_next(kdcli) -> None:
    tiny, pool = "recipes://data/tiny_teacher", "recipes://data/mini/valid"
    scored = kdcli(
        "evaluate", f"student.path={tiny}", "teacher=hf", f"teacher.path={tiny}", "run.dir=scores",
        "evaluation@evaluation.heldout=row_scores", f"evaluation.heldout.data.path={pool}", "batch.max_length=128",
    )  # fmt: skip
    assert scored.code == 0, scored.err
    found = lines(Path("scores"))
    assert len(found) == 90
    assert all(abs(line["difference"]) < 0.01 * line["student"] for line in found)  # itself, in bfloat16
    short = ["run.steps=1", "~evaluation@evaluation.heldout", "run.dir=run", "batch.max_length=64"]
    trained = kdcli(
        "distill", "+recipe=tiny", *short, "data=selected", "data.scores=scores/row_scores.jsonl",
        f"data.data.path={pool}", "data.by=student", "data.order=smallest", "data.keep=0.2", "data.per_domain=true",
    )  # fmt: skip
    assert trained.code == 0, trained.err
    report = json.loads(Path("run/data_report.json").read_text())
    assert len(report) == 8
    assert 10 < sum(domain["examples"] for domain in report.values()) < 30
