"""What a run writes: its metrics, its student, its evaluation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdcli.store import metrics
from kdcli.train.interrupt import Interrupt
from tests import runs


def test_each_step_has_one_line_with_these_metrics(tmp_path):
    run_dir = runs.write_run(tmp_path)
    assert runs.work(run_dir) == [0]
    first, *_, last = metrics.read(run_dir)
    assert list(first) == [
        "step", "time", "loss/kd", "loss/total", "lr", "grad_norm", "tokens", "tokens_per_second",
        *(f"domain/{name}/{key}" for name in ("prose", "verse")
          for key in ("weight", "loss", "prompt_share", "token_share", "gradient_share", "epoch")),
    ]  # fmt: skip
    assert first["lr"] == 0.0, "the rate that this step was made with: warm-up begins at zero"
    assert last["lr"] > 0
    assert last["tokens"] > first["tokens"] > 0


def test_lines_are_every_log_every_steps_and_at_evaluations_and_at_the_end(tmp_path):
    changes = {"run__steps": 7, "run__log_every": 3, "run__eval_every": 4, "evaluation": runs.heldout(tmp_path)}
    run_dir = runs.write_run(tmp_path, **changes)
    assert runs.work(run_dir) == [0]
    lines = runs.lines(run_dir)
    assert [line["step"] for line in lines] == [0, 3, 4, 6, 7]
    assert [line["step"] for line in lines if "eval/heldout/all/ppl" in line] == [0, 4, 7]


def test_a_loss_is_the_weighted_mean_of_its_terms(tmp_path):
    objective = {
        "kd": {"_target_": "kdcli.objective.forward_kl.ForwardKL", "weight": 0.25},
        "ce": {"_target_": "kdcli.objective.cross_entropy.CrossEntropy", "weight": 0.5},
    }
    run_dir = runs.write_run(tmp_path, objective=objective)
    assert runs.work(run_dir) == [0]
    for line in runs.lines(run_dir):
        assert line["loss/total"] == pytest.approx(0.25 * line["loss/kd"] + 0.5 * line["loss/ce"], rel=1e-5)


def scheduled(**settings: object) -> dict:
    return {"kd": {"_target_": "kdcli.objective.forward_kl.ForwardKL", **settings}}


def told(run_dir: Path, name: str) -> list[float]:
    """A metric of each step that has it."""
    return [line[name] for line in runs.lines(run_dir) if name in line]


def test_a_constant_schedule_is_the_number(tmp_path):
    number = runs.write_run(tmp_path / "number", objective=scheduled(temperature=2.0))
    schedule = {"schedule": "constant", "value": 2}
    constant = runs.write_run(tmp_path / "constant", objective=scheduled(temperature=schedule))
    assert runs.work(number) == [0]
    assert runs.work(constant) == [0]
    assert told(constant, "objective/kd/temperature") == [2.0] * 4
    for name in ("loss/kd", "grad_norm"):
        assert told(constant, name) == told(number, name)


def test_a_weight_may_fall_to_zero(tmp_path):
    """The other term goes on alone; the values told are those that each step was made with."""
    weight = {"schedule": "linear", "start": 2, "end": 0, "until": 0.5}
    objective = scheduled(weight=weight) | {"ce": {"_target_": "kdcli.objective.cross_entropy.CrossEntropy"}}
    run_dir = runs.write_run(tmp_path, objective=objective)
    assert runs.work(run_dir) == [0]
    assert told(run_dir, "objective/kd/weight") == [2.0, 1.0, 0.0, 0.0]
    for line in runs.lines(run_dir):
        total = line["objective/kd/weight"] * line["loss/kd"] + line["loss/ce"]
        assert line["loss/total"] == pytest.approx(total, rel=1e-5)
        assert line["grad_norm"] > 0


def test_an_epoch_is_a_pass_over_all_rows(tmp_path):
    """24 rows, 4 in a step: 6 steps."""
    epochs = {"schedule": "epochs", "values": [3, 2]}
    run_dir = runs.write_run(tmp_path, run__steps=14, run__save_every=0, objective=scheduled(temperature=epochs))
    assert runs.work(run_dir) == [0]
    commit = json.loads((run_dir / "checkpoints/step-000014/COMMIT.json").read_text())
    assert sum(commit["data"]["rows"].values()) == 24
    assert told(run_dir, "objective/kd/temperature") == [3.0] * 6 + [2.0] * 8


@pytest.mark.parametrize("ranks", [1, 2])
def test_schedules_go_on_exactly(ranks, tmp_path):
    """TAID's alpha is so large that t is far from the line: begun anew after the checkpoint, it would lag."""
    changes = {
        "run__steps": 6,
        "objective": scheduled(
            temperature={"schedule": "taid", "start": 0.4, "end": 1.0, "alpha": 0.9},
            weight={"schedule": "cosine", "start": 1, "end": 0.1},
        ),
    }
    whole = runs.write_run(tmp_path / "whole", **changes)
    assert runs.work(whole, ranks=ranks) == [0] * ranks
    stopped = runs.write_run(tmp_path / "stopped", **changes)
    assert runs.work(stopped, ranks=ranks, fault="step.optim:step=4:kill") != [0] * ranks
    assert runs.checkpoints(stopped) == ["step-000002"]
    assert runs.work(stopped, ranks=ranks) == [0] * ranks
    assert runs.lines(stopped) == runs.lines(whole)
    temperature = told(whole, "objective/kd/temperature")
    assert temperature[:2] == [0.4, 0.4]
    assert all(value > 0.4 + 0.6 * done / 6 + 0.02 for done, value in enumerate(temperature[2:], 2))


def test_training_lowers_the_loss_towards_the_teacher(tmp_path):
    run_dir = runs.write_run(tmp_path, run__steps=30, run__save_every=0, evaluation=runs.heldout(tmp_path))
    assert runs.work(run_dir) == [0]
    first, last = runs.lines(run_dir)[0], runs.lines(run_dir)[-1]
    assert last["eval/heldout/all/kl"] < 0.9 * first["eval/heldout/all/kl"]


@pytest.mark.parametrize(("stage", "ranks"), [(0, 1), (3, 2)])
@pytest.mark.parametrize("tied", [True, False])
def test_the_student_is_loaded_by_transformers_and_scores_the_same(stage, ranks, tied, tmp_path):
    content = runs.config()["student_init"]["config"] | {"tie_word_embeddings": tied}
    heldout = runs.heldout(tmp_path)
    run_dir = runs.write_run(
        tmp_path,
        engine__stage=stage,
        student_init__config=content,
        evaluation=heldout,
        run__export_dtype="fp32",
    )
    assert runs.work(run_dir, ranks=ranks) == [0] * ranks
    model = AutoModelForCausalLM.from_pretrained(run_dir / "student")
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "student")
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    prompt = tokenizer("the cat", return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=3, do_sample=False).shape[1] > prompt["input_ids"].shape[1]
    files = {path.name for path in (run_dir / "student").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= files
    assert not [name for name in files if name.endswith((".bin", ".pt"))]
    scored = evaluated(tmp_path, run_dir / "student", heldout)
    assert scored == pytest.approx(last_evaluation(run_dir), rel=1e-5)


def last_evaluation(run_dir: Path) -> dict[str, float]:
    return {key: value for key, value in runs.lines(run_dir)[-1].items() if key.startswith("eval/")}


def evaluated(folder: Path, student: Path, heldout: dict, ranks: int = 1) -> dict[str, float]:
    """What `kdcli evaluate` writes."""
    base = runs.config()
    run_dir = folder / f"evaluation-{ranks}"
    run_dir.mkdir()
    config = {
        "verb": "evaluate",
        "run": {"name": "evaluate", "dir": str(run_dir), "seed": 0},
        "batch": {"micro_size": 2, "max_length": 32},
        "teacher": base["teacher"],
        "student": base["student"] | {"path": str(student)},
        "evaluation": heldout,
        "report": {},
        "engine": base["engine"],
        "launch": base["launch"],
    }
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
    assert runs.work(run_dir, ranks=ranks) == [0] * ranks
    assert runs.state(run_dir)["state"] == "done"
    [line] = runs.lines(run_dir)
    assert line.pop("step") == 0
    return line


def test_an_evaluation_does_not_depend_on_the_number_of_processes(tmp_path):
    run_dir = runs.write_run(tmp_path)
    assert runs.work(run_dir) == [0]
    one, two = (evaluated(tmp_path, run_dir / "student", runs.heldout(tmp_path), ranks) for ranks in (1, 2))
    assert two == pytest.approx(one, rel=1e-6)


def test_the_commit_names_what_the_checkpoint_is_of(tmp_path):
    run_dir = runs.write_run(tmp_path)
    assert runs.work(run_dir) == [0]
    commit = json.loads((run_dir / "checkpoints/step-000004/COMMIT.json").read_text())
    assert commit["step"] == 4
    assert commit["tokens"] == runs.lines(run_dir)[-1]["tokens"]
    assert sum(commit["data"]["drawn"].values()) == 16
    assert len(commit["config"]) == 32
    engine = json.loads((run_dir / "checkpoints/step-000004/engine/engine.json").read_text())
    assert engine == {"stage": 0, "world_size": 1, "precision": "fp32"}


def test_mixed_precision_learns_as_32_bit_does(tmp_path):
    losses = {}
    for precision in ("fp32", "bf16_autocast", "bf16"):
        run_dir = runs.write_run(tmp_path / precision, engine__precision=precision, engine__stage=1)
        assert runs.work(run_dir) == [0]
        losses[precision] = [line["loss/total"] for line in runs.lines(run_dir)]
        assert AutoModelForCausalLM.from_pretrained(run_dir / "student").dtype == torch.bfloat16
    assert losses["bf16_autocast"] == pytest.approx(losses["fp32"], rel=0.03)
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.03)


def test_signal_handlers_are_put_back():
    import signal

    before = signal.getsignal(signal.SIGTERM)
    with Interrupt():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before
