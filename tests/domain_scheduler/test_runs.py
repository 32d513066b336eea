"""Every scheduler in a real run: a real probe, real updates, and the weights that come of them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tests.domain_scheduler.options import OPTIONS, SOON, node
from tests.runs import lines, state, work, write_run

GIVEN = {
    "static": {"weights": {"prose": 1, "verse": 3}},
    "curriculum": {"stages": [{"steps": 1, "domains": ["prose"]}, {"domains": ["verse"]}], "keep": False},
    "ado": {"ignore": 0, "warmup": 4, "refit": 1},
}
STEPS = 6
CROSS_ENTROPY = {"ce": {"_target_": "kdcli.objective.cross_entropy.CrossEntropy"}}  # what doremi compares


@pytest.mark.parametrize("name", OPTIONS)
def test_a_scheduler_works_in_a_run(name: str, tmp_path: Path) -> None:
    changes = SOON.get(name, {}) | GIVEN.get(name, {}) | ({"interval": 1} if "interval" in node(name) else {})
    settings = {"run__steps": STEPS, "probe__rows": 2, "objective": CROSS_ENTROPY}
    run_dir = write_run(tmp_path, domain_scheduler=node(name, **changes), **settings)
    assert work(run_dir) == [0], state(run_dir)
    steps = [line for line in lines(run_dir) if line["step"]]
    weights = [[line[f"domain/{domain}/weight"] for domain in ("prose", "verse")] for line in steps]
    assert len(weights) == STEPS
    assert all(math.fsum(pair) == pytest.approx(1.0) for pair in weights)
    averaged = [steps[-1].get(f"domain/{domain}/average") for domain in ("prose", "verse")]
    if averaged != [None, None]:  # of the weights after each of the updates, which came after steps 1 to 5
        assert averaged == pytest.approx([math.fsum(pair[n] for pair in weights[1:]) / (STEPS - 1) for n in (0, 1)])
    assert (averaged != [None, None]) == ("interval" in node(name))
    assert (weights[-1] != weights[0]) == (name not in ("natural", "uniform", "temperature", "static"))


def test_schedulers_of_training_losses_need_no_probe_after_the_teachers_half(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path, domain_scheduler=node("doremi"), probe__rows=2, objective=CROSS_ENTROPY)
    assert work(run_dir) == [0], state(run_dir)
    assert (run_dir / "probe.json").exists()
    assert not [key for line in lines(run_dir) for key in line if key.startswith("probe/")]


def test_a_run_interrupted_between_updates_ends_with_the_same_weights(tmp_path: Path) -> None:
    changes = {"run__steps": 6, "run__save_every": 3, "domain_scheduler": node("ddk", interval=2), "probe__rows": 2}
    whole = write_run(tmp_path / "whole", **changes)
    assert work(whole) == [0]
    broken = write_run(tmp_path / "broken", **changes)
    assert work(broken, fault="step.forward:step=5:kill") == [None]
    assert work(broken) == [0]
    assert lines(broken) == lines(whole)


def test_doge_says_the_same_under_zero_0_to_2(tmp_path: Path) -> None:
    """Stage 3 is refused before a run: tests/config/test_domains.py."""
    told = []
    for stage, ranks in ((0, 1), (1, 2), (2, 2)):
        scheduler = node("doge", interval=1, lr=0.01)
        exact = {"run__steps": 3, "run__save_every": 0, "student_init__config__attention_dropout": 0.0}
        run_dir = write_run(
            tmp_path / str(stage), domain_scheduler=scheduler, probe__rows=2, engine__stage=stage, **exact
        )
        assert work(run_dir, ranks=ranks) == [0] * ranks, state(run_dir)
        keys = ("/alignment", "/weight")
        told.append([{key: line[key] for key in line if key.endswith(keys)} for line in lines(run_dir)])
    assert {f"probe/{name}/alignment" for name in ("prose", "verse")} <= {key for line in told[0] for key in line}
    assert len({line["domain/prose/weight"] for line in told[0] if "domain/prose/weight" in line}) > 1, "it moves"
    for other in told[1:]:
        assert [line.keys() for line in other] == [line.keys() for line in told[0]]
        for line, same in zip(other, told[0], strict=True):
            assert line == pytest.approx(same, rel=1e-3)
