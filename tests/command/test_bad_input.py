"""Every kind of wrong input: exit code 2, a sentence that says where and what to do, and nothing written."""

from __future__ import annotations

from pathlib import Path

import pytest

TINY = ("distill", "+recipe=tiny")

BAD = {
    "unknown verb": (("distil",), "did you mean distill?"),
    "unknown flag": ((*TINY, "--multrun"), "did you mean --multirun?"),
    "unknown key": ((*TINY, "run.stepz=3"), "run.stepz: there is no such key; did you mean run.steps?"),
    "unknown setting": (
        (*TINY, "+objective.kd.temprature=2"),
        "objective.kd.temprature: ForwardKL has no such setting; did you mean objective.kd.temperature?",
    ),
    "unknown section": (
        (*TINY, "+optimiser=x"),
        "optimiser: `kdcli distill` has no such section; did you mean optimizer?",
    ),
    "number as option": (
        ("distill", "objective=3"),
        "objective=3: is not the name of an option; there is adaptive_kl, alm",
    ),
    "unknown option": ((*TINY, "teacher=hg"), "teacher=hg: the group teacher has no such option; "),
    "unknown term option": ((*TINY, "objective@objective.kd=reverse_lk"), "did you mean reverse_kl?"),
    "unknown term": ((*TINY, "objective@objective.x=cross_entropy"), "write +objective@objective.x="),
    "unknown group": ((*TINY, "objectiv@objective.kd=x"), "there is no group objectiv; did you mean objective?"),
    "unknown recipe": (("distill", "+recipe=tinny"), "+recipe=tinny: there is no such recipe; did you mean tiny?"),
    "recipe file": (("distill", "recipe=./none.yaml"), "there is no file"),
    "bare recipe": (("distill", "tiny"), "write `kdcli distill +recipe=tiny`"),
    "no value": ((*TINY, "run.steps=[1"), "is not KEY=VALUE"),
    "several values": ((*TINY, "run.steps=1,2"), "add -m"),
    "wrong type": ((*TINY, "run.steps=many"), "run.steps: is 'many', but must be a whole number"),
    "wrong choice": (
        (*TINY, "objective.kd.temperature_scale=t3"),
        "objective.kd.temperature_scale: is 't3', but must be one of none, t2",
    ),
    "out of range": ((*TINY, "run.steps=0"), "run.steps: is 0, but must be at least 1"),
    "refused by a constructor": ((*TINY, "objective.kd.temperature=-1"), "temperature is -1"),
    "missing value": (("distill",), "teacher.path: must be given; add teacher.path="),
    "broken interpolation": ((*TINY, "run.seed=${run.sed}"), "run.seed"),
    "variable not set": ((*TINY, "data.path=${oc.env:KDCLI_NOT_SET}"), "KDCLI_NOT_SET is not set"),
    "missing data": ((*TINY, "data.path=nowhere.jsonl"), "nowhere.jsonl"),
    "missing packaged data": ((*TINY, "data.path=recipes://data/minni"), "recipes://data/minni: there is no such file"),
    "missing package": ((*TINY, "teacher.path=package://no-such-package/x.gguf"), "pip install"),
    "missing held-out data": ((*TINY, "evaluation.heldout.data.path=nowhere"), "nowhere"),
    "missing model": ((*TINY, "teacher.path=./nowhere"), "teacher.path: there is no file or folder"),
    "missing hub model": ((*TINY, "teacher.path=no-such/model"), "teacher: no-such/model: "),
    "missing student": (
        ("evaluate", "student.path=a", "evaluation.heldout.data.path=recipes://data/mini/valid"),
        "a: ",
    ),
    "batch arithmetic": ((*TINY, "batch.size=6", "batch.micro_size=4"), "set batch.size=8, or batch.micro_size=3"),
    "packing": (
        (*TINY, "student.attention=flash_attention_2"),
        "student.attention: flash_attention_2 lets packed examples of a batch see each other",
    ),
    "needs": ((*TINY, "teacher=none"), "objective.kd: ForwardKL needs the teacher's distribution"),
    "missing pairs": (
        (*TINY, "objective@objective.kd=dpo", "batch.packing=false"),
        "objective.kd: DPO needs rows with chosen and rejected, of which the data (recipes://data/mini/train) have "
        "none; add some, or choose an objective that does without, such as adaptive_kl",
    ),
    "missing scores": (
        (*TINY, "objective@objective.kd=kto", "batch.packing=false"),
        "objective.kd: KTO needs rows with a score, of which the data",
    ),
    "missing groups": (
        (*TINY, "objective@objective.kd=rrhf", "batch.packing=false"),
        "objective.kd: RRHF needs several rows of one group, each with a score, of which the data",
    ),
    "packed pairs": ((*TINY, "objective@objective.kd=dpo"), "batch.packing: objective.kd (DPO) compares sequences"),
    "no objective": ((*TINY, "~objective@objective.kd"), "add objective@objective.kd=forward_kl"),
    "unknown domain": ((*TINY, "objective.kd.domains=[pyton]"), "the data have no domain pyton; did you mean python?"),
    "domain weights": (
        (*TINY, "domain_scheduler=static", "domain_scheduler.weights={prosa: 1}"),
        "domain_scheduler.weights.prosa",
    ),
    "resume nowhere": ((*TINY, "run.resume=nowhere"), "run.resume: there is no folder nowhere"),
    "resume misspelt": ((*TINY, "run.resume=nevr"), "did you mean never?"),
    "resume from no run": ((*TINY, "run.resume=."), "neither a checkpoint (it has no COMMIT.json) nor a run folder"),
    "student from nothing": ((*TINY, "student_init=pretrained"), "add student.path="),
    "secret": ((*TINY, "+teacher.api_key=abc"), "holds a secret"),
    "foreign code": ((*TINY, "teacher._target_=os.system"), "os.system is not a class that a config may name"),
    "foreign callback": ((*TINY, "+hydra.callbacks.x._target_=os.system"), "hydra.callbacks"),
    "foreign logging": ((*TINY, "+hydra.job_logging.handlers.x.class=os.system"), "is not a logging class"),
    "environment": ((*TINY, "+hydra.job.env_set.LD_PRELOAD=x"), "set them in the shell"),
    "run name": ((*TINY, "run.name=../up"), "run.name: '../up' is not made of letters"),
    "run folder": ((*TINY, "run.dir=/proc/x"), "run.dir: /proc/x cannot be made"),
    "nothing to evaluate": (("evaluate", "~evaluation@evaluation.heldout", "student.path=x"), "nothing to evaluate"),
    "unknown list": (("ls", "objektive"), "did you mean objective?"),
    "unknown copy": (("copy", "tinny", "x.yaml"), "did you mean tiny?"),
    "config dir": ((*TINY, "--config-dir", "nowhere"), "there is no such folder"),
    "sweep of folders": ((*TINY, "run.dir=a,b", "-m"), "set hydra.sweep.dir=FOLDER"),
    "sweep of options": ((*TINY, "objective@objective.kd=forward_kl,reverse_lk", "-m"), "did you mean reverse_kl?"),
    "search without a metric": ((*TINY, "hydra/sweeper=optuna", "run.seed=1,2", "-m"), "add optimize="),
}


@pytest.mark.parametrize("case", BAD)
def test_wrong_input_is_named_and_leaves_nothing_behind(kdcli, tmp_path: Path, case: str) -> None:
    arguments, says = BAD[case]
    result = kdcli(*arguments)
    assert says in result.err
    assert result.code == 2
    assert "Traceback" not in result.err
    assert result.out == ""
    assert list(tmp_path.iterdir()) == []


def test_all_problems_are_told_at_once(kdcli) -> None:
    result = kdcli(*TINY, "run.seed=x", "batch.size=y", "+teacher.z=1", "optimizer.lr=fast", "+foo=1")
    assert result.err.startswith("error: 5 problems\n")
    for place in ("run.seed", "batch.size", "teacher.z", "optimizer.lr", "foo"):
        assert f"\n  - {place}: " in result.err


def test_more_processes_than_gpus_is_refused(kdcli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    result = kdcli(*TINY, "launch.processes=4", "batch.size=32")
    assert result.code == 2
    assert "launch.processes: 4 processes, but this machine has 2 GPU(s)" in result.err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_under_a_file_is_refused(kdcli, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = kdcli(*TINY, "run.dir=file/run")
    assert result.code == 2
    assert "run.dir: file/run cannot be made" in result.err
