"""What a domain scheduler needs is asked for before anything loads, in one sentence each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kdcli.config.check import check
from kdcli.errors import ConfigError
from tests import runs

DDK = {"_target_": "kdcli.domain_scheduler.ddk.DDK"}
DOGE = {"_target_": "kdcli.domain_scheduler.doge.DoGE", "lr": 0.01}
DOREMI = {"_target_": "kdcli.domain_scheduler.doremi.DoReMi"}
NONE = {"_target_": "kdcli.teacher.none.NoTeacher"}
CE = {"ce": {"_target_": "kdcli.objective.cross_entropy.CrossEntropy"}}


def config(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    runs.write_run(tmp_path)
    return runs.config(**{"data__path": str(tmp_path / "data"), "run__dir": str(tmp_path / "run"), **changes})


def held_out(path: Path) -> dict[str, Any]:
    return {"data": {"_target_": "kdcli.data.jsonl.Jsonl", "path": str(path)}, "rows": 5, "micro_size": None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"domain_scheduler": DDK, "teacher": NONE, "objective": CE, "student__path": "recipes://data/tiny_teacher"},
            "domain_scheduler: DDK cannot work: it needs the teacher's logprobs, which NoTeacher does not provide",
        ),
        (
            {"domain_scheduler": DOREMI},
            r"DoReMi compares .* a cross entropy, and here objective\.kd is not .* domain_scheduler\.losses=heldout",
        ),
        ({"domain_scheduler": DOREMI | {"reference": {"prose": 2.0, "verse": 3.0}}}, r"objective\.kd is not its cross"),
        ({"domain_scheduler": DOREMI, "objective": {"ce": CE["ce"] | {"weight": 0.5}}}, r"objective\.ce is not"),
        (
            {"domain_scheduler": DOREMI, "objective": {"ce": CE["ce"] | {"label_smoothing": 0.1}}},
            r"objective\.ce is not",
        ),
        ({"domain_scheduler": DOREMI, "objective": {"ce": CE["ce"], "b": CE["ce"]}}, "a weighted sum"),
        ({"domain_scheduler": DOGE, "engine__stage": 3}, r"whole gradients.* set engine=zero2"),
        ({"probe__rows": 0}, r"probe\.rows: is 0, but must be at least 1"),
        ({"probe__data": 3}, r"probe\.data: "),
        ({"probe__data": {"_target_": "kdcli.data.jsonl.Jsonl", "pth": "x"}}, r"probe\.data\.pth: .*did you mean"),
    ],
)
def test_what_cannot_be_measured_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        check(config(tmp_path, **changes))


def test_a_training_loss_that_is_a_cross_entropy_may_be_compared_with_one(tmp_path: Path) -> None:
    check(config(tmp_path, domain_scheduler=DOREMI, objective=CE))
    check(config(tmp_path, domain_scheduler=DOREMI | {"losses": "heldout", "interval": 10}))
    check(config(tmp_path, domain_scheduler={"_target_": "kdcli.domain_scheduler.odm.ODM"}))  # compares it with nothing


def test_a_weight_that_changes_makes_no_cross_entropy(tmp_path: Path) -> None:
    falling = {"ce": CE["ce"] | {"weight": {"schedule": "linear", "start": 1, "end": 0}}}
    with pytest.raises(ConfigError, match=r"domain_scheduler: DoReMi compares"):
        check(config(tmp_path, domain_scheduler=DOREMI, objective=falling))


def test_domains_without_held_out_rows_are_named(tmp_path: Path) -> None:
    runs.write_run(tmp_path)
    only = held_out(tmp_path / "data/verse.jsonl")
    with pytest.raises(ConfigError, match=r"probe\.data: domain prose has no held-out rows .*DDK.* there are verse"):
        check(config(tmp_path, domain_scheduler=DDK, probe=only))
    check(config(tmp_path, domain_scheduler=DDK, probe=held_out(tmp_path / "data")))
    check(config(tmp_path, probe=only))  # nothing is measured


def test_held_out_rows_may_be_data_of_their_own(tmp_path: Path) -> None:
    """Then nothing is taken from training: 24 rows."""
    runs.write_run(tmp_path)
    changes = {"domain_scheduler": DDK | {"interval": 2}, "probe": held_out(tmp_path / "data")}
    run_dir = runs.write_run(tmp_path, run__steps=2, **changes)
    assert runs.work(run_dir) == [0]
    commit = json.loads((run_dir / "checkpoints/step-000002/COMMIT.json").read_text())
    assert sum(commit["data"]["rows"].values()) == 24
    assert "probe/verse/ppl_ratio" in runs.lines(run_dir)[0]
