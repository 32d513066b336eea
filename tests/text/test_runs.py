"""Whole runs on pairs, groups, other prompts and other tokenizers: what is told is finite, and the numbers fall."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests import runs
from tests.text.tokenizers import metaspace

WORDS = runs.WORDS


def term(name: str, target: str, **settings: Any) -> dict[str, Any]:
    return {name: {"_target_": f"kdcli.objective.{target}", **settings}}


def rows(kind: str) -> list[dict[str, Any]]:
    answers = [" ".join(WORDS[i : i + 6]) for i in range(12)]
    if kind == "pairs":
        return [{"prompt": "say ", "chosen": answer, "rejected": " ".join(answer[::-1])} for answer in answers]
    if kind == "groups":
        return [
            {"prompt": "say ", "response": answer, "group": str(n // 3), "score": n % 3}
            for n, answer in enumerate(answers)
        ]
    hint = {"teacher_prompt": "a hint: "} if kind == "hints" else {}
    return [{"prompt": "say ", "response": answer, **hint} for answer in answers]


def ran(folder: Path, kind: str, objective: dict[str, Any], **changes: Any) -> list[dict[str, Any]]:
    data = folder / "data"
    data.mkdir()
    (data / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(kind)))
    run = runs.write_run(folder, objective=objective, **changes)
    assert runs.work(run) == [0], (run / "kdcli.log").read_text()
    lines = runs.lines(run)
    losses = [line["loss/total"] for line in lines if "loss/total" in line]
    assert len(losses) == runs.config(**changes)["run"]["steps"]
    assert all(map(math.isfinite, losses))
    return lines


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("target", ["uld.ULD", "gold.GOLD", "alm.ALM"])
def test_a_student_learns_from_a_teacher_with_another_tokenizer(tmp_path: Path, target: str, packing: bool) -> None:
    own = tmp_path / "tokenizer"
    metaspace().save_pretrained(own)
    lines = ran(
        tmp_path,
        "answers",
        {**term("across", target), **term("ce", "cross_entropy.CrossEntropy")},
        student__tokenizer=str(own),
        batch__packing=packing,
        run__steps=12,
        evaluation=runs.heldout(tmp_path),
    )
    told = [line for line in lines if "loss/across" in line]
    assert told[-1]["loss/across"] < told[0]["loss/across"]
    assert told[-1]["loss/ce"] < told[0]["loss/ce"]
    evaluated = [line for line in lines if any(key.startswith("eval/") for key in line)]
    assert evaluated
    assert not any("kl" in key or "teacher" in key for line in evaluated for key in line)  # of other ids


def test_a_teacher_may_read_hints(tmp_path: Path) -> None:
    """Its loss differs from that of the same run without them."""
    hinted, plain = (tmp_path / name for name in ("hinted", "plain"))
    losses = []
    for folder, kind in ((hinted, "hints"), (plain, "answers")):
        folder.mkdir()
        lines = ran(folder, kind, term("kd", "forward_kl.ForwardKL"), evaluation=runs.heldout(folder))
        losses.append([line["loss/kd"] for line in lines if "loss/kd" in line])
        assert any("eval/heldout/all/kl" in line for line in lines)
    assert losses[0][0] != pytest.approx(losses[1][0], rel=1e-3)
    report = json.loads((hinted / "run" / "data_report.json").read_text())["rows"]
    assert report["teacher_tokens"] > report["tokens"]


@pytest.mark.parametrize(("kind", "target"), [("pairs", "dpo.DPO"), ("groups", "rrhf.RRHF")], ids=["pairs", "groups"])
def test_answers_are_compared(tmp_path: Path, kind: str, target: str) -> None:
    lines = ran(tmp_path, kind, term("compared", target), run__steps=12)
    told = [line["loss/compared"] for line in lines if "loss/compared" in line]
    assert sum(told[-3:]) < sum(told[:3])
    report = json.loads((tmp_path / "run" / "data_report.json").read_text())["rows"]
    assert (report["pairs"], report["groups"]) == ((12, 0) if kind == "pairs" else (0, 4))
