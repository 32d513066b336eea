"""Every option of the group `objective` trains a tiny pair of real models, through checks, worker and export."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from kdcli.api import ModelShape, Objective
from kdcli.config.build import build
from kdcli.config.check import check
from kdcli.store import paths
from kdcli.train.schedule import start_values
from tests import families, runs

CONFIGS = sorted((paths.configs() / "objective").glob("*.yaml"))
STEPS = 20
CE = {"_target_": "kdcli.objective.cross_entropy.CrossEntropy"}
PROMPTS = ("w1 w2 w3", "w4 w5", "w6 w7 w8 w9", "w2 w4 w6")
ANSWERS = ("w10 w11 w12 w13 w14", "w15 w16 w17 w18", "w19 w20 w21 w22 w23 w24")


def rows(kind: Objective) -> Iterator[tuple[str, dict[str, Any]]]:
    """(domain, row) of what the objective learns from."""
    for number, prompt in enumerate(PROMPTS):
        if "rejected" in kind.columns:
            yield "pairs", {"prompt": prompt, "chosen": ANSWERS[number % 3], "rejected": ANSWERS[(number + 1) % 3]}
        elif "score" in kind.columns:
            for place, answer in enumerate(ANSWERS):
                score = float((place + number) % 3)
                yield "scored", {"prompt": prompt, "response": answer, "group": f"g{number}", "score": score}
        else:
            domain = ("label", "rationale")[number % 2]
            yield domain, {"prompt": prompt, "response": ANSWERS[number % 3]}


def run(folder: Path, node: dict[str, Any], kind: Objective, *, with_ce: bool) -> Path:
    """A run folder for this objective, with data of the kind that it needs and a student of 20,000 parameters."""
    data = folder / "data"
    data.mkdir()
    for domain, row in rows(kind):
        with (data / f"{domain}.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
    student = {"_target_": "kdcli.student.hf.HFStudent", "path": None, "attention": "eager"}
    teacher = {
        "_target_": "kdcli.teacher.hf.HFTeacher",
        "path": families.folder(folder / "teacher", "llama"),
        "dtype": "float32",
        "attention": "eager",
    }
    if kind.cross_tokenizer:
        teacher["path"] = "recipes://data/tiny_teacher"
        families.tokenizer().save_pretrained(folder / "words")
        student["tokenizer"] = str(folder / "words")
    return runs.write_run(
        folder,
        data__path=str(data),
        run__steps=STEPS,
        run__save_every=0,
        batch__overflow="truncate",
        teacher=teacher,
        student=student,
        objective={"it": node, **({"ce": CE} if with_ce else {})},
        lr_schedule={"_target_": "torch.optim.lr_scheduler.ConstantLR", "factor": 1.0},
    )


ALONE = [pytest.param(file, False, id=file.stem) for file in CONFIGS]
BESIDE = ("forward_kl", "dpo", "hidden_mse", "uld", "multi_level_ot")  # one of each scope; `verify` does it for all
WITH_CE = [pytest.param(file, True, id=f"{file.stem}-ce") for file in CONFIGS if file.stem in BESIDE]


@pytest.mark.parametrize(("file", "with_ce"), ALONE + WITH_CE)
def test_twenty_steps_lower_the_loss(tmp_path: Path, file: Path, with_ce: bool) -> None:
    node = start_values(yaml.safe_load(file.read_text()))  # what a schedule moves need not fall
    kind = build(node, Objective)
    run_dir = run(tmp_path, node, kind, with_ce=with_ce)
    check(yaml.safe_load((run_dir / "config.yaml").read_text()))
    assert runs.work(run_dir) == [0], (run_dir / "kdcli.log").read_text()
    lines = [line for line in runs.lines(run_dir) if line["step"] > 0]
    assert len(lines) == STEPS
    told = "loss/total" if with_ce else "loss/it"  # the data may pull away from a teacher that never saw them
    first, last = (sum(line[told] for line in part) / 4 for part in (lines[:4], lines[-4:]))
    if getattr(kind, "falls", True):
        assert last < first
    assert all(line["grad_norm"] > 0 for line in lines[:4])
    exported = AutoModelForCausalLM.from_pretrained(run_dir / "student")
    assert all(torch.isfinite(parameter).all() for parameter in exported.parameters())
    if learns(kind):
        assert (run_dir / "objectives" / "it.safetensors").is_file()


def learns(objective: Objective) -> bool:
    """Whether it has parameters, once it knows the models' shapes."""
    shape = ModelShape(layers=2, width=8, heads=2, kv_heads=2, head_width=4, vocab_size=11)
    objective.fit(shape, shape)
    return any(True for _ in objective.parameters())
