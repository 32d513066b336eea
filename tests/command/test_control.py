"""`+control=sft` and `run.seeds`: matched runs beside the run, once per seed; what each closed of the gap."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import yaml

from kdcli.command import control, sweep, sweep_table
from kdcli.errors import ConfigError
from kdcli.store.metrics import MetricsLog


def rows() -> list[dict[str, Any]]:
    (folder,) = Path("runs/distill").glob("sweep-*")
    return json.loads((folder / "sweep.json").read_text())


def configs() -> list[dict[str, Any]]:
    return [yaml.safe_load((Path(row["folder"]) / "config.yaml").read_text()) for row in rows()]


@pytest.mark.parametrize("typed", ["+control=sft", "control=sft", "+control=[sft]"])
def test_the_control_is_the_run_without_distillation_and_nothing_else(kdcli, pretend, typed: str) -> None:
    more = ["+objective@objective.extra=hinton", "objective.kd.temperature=2", "run.seed=5"]
    assert kdcli("distill", *pretend, *more, typed).code == 0
    own, matched = configs()
    assert [list(one["objective"]) for one in (own, matched)] == [["kd", "extra"], ["ce"]]
    assert matched["objective"]["ce"]["_target_"] == "kdcli.objective.cross_entropy.CrossEntropy"
    assert "control" not in own and "control" not in matched
    different = {key for key in own if own[key] != matched[key]}
    assert different == {"objective", "run"}
    assert own["run"] | {"dir": ""} == matched["run"] | {"dir": ""}


def test_seeds_are_jobs_that_differ_in_nothing_else(kdcli, pretend) -> None:
    result = kdcli("distill", *pretend, "run.seeds=[3,4,7]")
    assert result.code == 0
    assert [one["run"]["seed"] for one in configs()] == [3, 4, 7]
    for one in configs():
        one["run"] |= {"seed": 0, "dir": ""}
        assert one == configs()[0] | {"run": configs()[0]["run"] | {"seed": 0, "dir": ""}}
    assert "mean ± standard deviation over seeds" in result.out


def test_control_seeds_and_a_sweep_make_every_combination_once(kdcli, pretend) -> None:
    command = ["distill", *pretend, "+control=sft", "run.seeds=[0,1]", "optimizer.lr=0.1,0.2", "-m"]
    assert kdcli(*command).code == 0
    found = {(one["optimizer"]["lr"], one["run"]["seed"], *one["objective"]) for one in configs()}
    assert found == {(lr, seed, term) for lr in (0.1, 0.2) for seed in (0, 1) for term in ("kd", "ce")}
    assert len(rows()) == 8
    (launched,) = Path("runs/distill").glob("sweep-*/launched")
    again = kdcli(*command)
    assert again.out.count("already complete") == 8
    assert len(launched.read_text().splitlines()) == 8


def test_a_failed_seed_is_a_row_and_missing_in_the_mean(kdcli, pretend) -> None:
    result = kdcli("distill", *pretend, "run.seeds=[0,1]", "optimizer.lr=0.1,0.2", "launch.fail_at_lr=0.2", "-m")
    assert result.code == 1
    table = result.out[result.out.index("mean ± standard deviation") :].splitlines()
    assert table[2].split() == ["0.1", "2", "0.2", "±", "0", "0.1", "±", "0"]
    assert table[3].split() == ["0.2", "0", "of", "2"]


def test_one_config_is_shown_with_its_control_and_without_seeds(kdcli) -> None:
    shown = kdcli("distill", "+recipe=tiny", "+control=sft", "run.seeds=[1,2]", "--cfg", "job")
    assert shown.code == 0, shown.err
    assert list(yaml.safe_load(shown.out)["control"]["objective"]) == ["ce"]


@pytest.mark.parametrize(
    ("typed", "sentence"),
    [
        (["run.seeds=[]"], r"run.seeds: is \[\], but must be a list of different integers"),
        (["run.seeds=[1,1]"], r"run.seeds: is \[1,1\]"),
        (["run.seeds=[a]"], "run.seeds: is"),
        (["run.seeds=[0,1]", "run.seed=2"], "run.seed is given too"),
        (["run.seeds=[0,1]", "hydra/sweeper=optuna"], "search first"),
    ],
)
def test_wrong_seeds_are_refused(typed: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        control.plan("distill", typed)


def test_an_unknown_control_is_refused_with_the_nearest(kdcli, pretend) -> None:
    result = kdcli("distill", *pretend, "+control=stf")
    assert result.code == 2
    assert "did you mean sft?" in result.err


def test_a_control_of_ones_own_replaces_the_sections_it_names(kdcli, pretend) -> None:
    Path("configs/control").mkdir(parents=True)
    Path("configs/control/even.yaml").write_text("# Even\ndefaults:\n  - /domain_scheduler@domain_scheduler: uniform\n")
    assert kdcli("distill", *pretend, "+control=[sft,even]").code == 0
    kinds = [(next(iter(one["objective"])), one["domain_scheduler"]["_target_"].rsplit(".")[-1]) for one in configs()]
    assert kinds == [("kd", "Natural"), ("ce", "Natural"), ("kd", "Uniform")]


def job(number: int, seed: int, chosen: str, state: str = "done", **metrics: float) -> dict[str, Any]:
    return {
        "number": number,
        "overrides": [f"control={chosen}", f"run.seed={seed}"],
        "state": state,
        "metrics": {"loss/total": metrics["loss"]},
        "closed": {"heldout": metrics["closed"]} if "closed" in metrics else {},
    }


def test_means_and_standard_deviations_are_those_of_the_statistics_module() -> None:
    found = sweep_table.means(
        [
            job(0, 0, "none", loss=1.0, closed=0.5),
            job(1, 1, "none", loss=2.0, closed=0.7),
            job(2, 2, "none", loss=6.0, closed=0.6),
            job(3, 0, "sft", loss=4.0),
            job(4, 1, "sft", loss=9.0, state="failed"),
        ]
    )
    assert [(one["chosen"], one["done"], one["seeds"]) for one in found] == [
        ({"control": "none"}, 3, 3),
        ({"control": "sft"}, 1, 2),
    ]
    assert found[0]["values"]["loss/total"] == (3.0, pytest.approx(statistics.stdev([1, 2, 6])))
    assert found[0]["values"]["closed/heldout"] == pytest.approx((0.6, 0.1))
    assert found[1]["values"]["loss/total"] == (4.0, None)


def test_closed_is_the_share_of_the_gap_in_log_perplexity(tmp_path: Path) -> None:
    """From 1000 to 100 where the teacher has 10: half of the way, ln 10 of 2 ln 10."""
    log = MetricsLog(tmp_path)
    log.append(0, {"eval/heldout/all/ppl": 1000.0, "eval/heldout/all/teacher_ppl": 10.0})
    assert sweep._closed(tmp_path) == {}  # there is no after
    log.append(3, {"loss/total": 1.0})
    log.append(5, {"eval/heldout/all/ppl": 100.0, "eval/heldout/all/teacher_ppl": 10.0})
    assert sweep._closed(tmp_path) == {"heldout": pytest.approx(0.5)}


@pytest.mark.slow
def test_run_and_control_draw_the_same_rows_and_as_many_tokens(kdcli) -> None:
    short = ["run.steps=3", "batch.size=4", "batch.max_length=64", "evaluation.heldout.rows=1"]
    short += ["evaluation.heldout.max_length=64"]
    result = kdcli("distill", "+recipe=tiny", *short, "+control=sft", "run.seeds=[1]")
    assert result.code == 0, result.err
    (folder,) = Path("runs/tiny").glob("sweep-*")
    jobs = json.loads((folder / "sweep.json").read_text())
    tokens = {}
    for one in jobs:
        lines = [json.loads(line) for line in (Path(one["folder"]) / "metrics.jsonl").read_text().splitlines()]
        tokens[tuple(one["overrides"][-2:])] = [line["tokens"] for line in lines if "tokens" in line]
        assert one["closed"]["heldout"] > 0
    assert tokens["control=none", "run.seed=1"] == tokens["control=sft", "run.seed=1"]
    assert len(set(tokens["control=none", "run.seed=1"])) > 1
    assert "heldout closed" in result.out
