"""The benchmark's exact bars, on heads small enough for a test: FLOPs, bytes, and the gate that voids wrong rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks import bars, loss
from benchmarks.contenders import TOP, Contender, contenders
from benchmarks.measure import Job, Row, measure
from benchmarks.models import Pair, fixed, heads
from benchmarks.table import show
from kdcli.api import Batch

VOCAB, WIDTH = 20_000, 32
CPU = torch.device("cpu")


def jobs(number: int, masked: float = 0.0) -> tuple[Pair, Batch, list[Job]]:
    pair = heads(number, VOCAB, WIDTH, CPU, torch.float32)
    batch = fixed(number, masked, VOCAB, rows=1)
    mine = [c for c in contenders(pair, batch, ["JSD", TOP]) if not c.tool.startswith(("TRL", "Liger"))]
    return pair, batch, [Job(contender=c, batch=batch) for c in mine]


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, Row]]:
    found = {}
    for title, number, masked in (
        ("W1: 2 x 512", 300, 0.0),
        ("W2", 300, 0.75),
        ("W6, few", 300, 0.0),
        ("W6, many", 600, 0.0),
    ):
        pair, _, todo = jobs(number, masked)
        found[title] = measure(pair, todo, 0, CPU)
    return found


def test_kdcli_does_four_matmuls_per_supervised_target_and_holds_no_logits_of_all(results: dict) -> None:
    for bar in [*bars._flops(results), *bars._slope(results), *bars._compaction(results)]:
        assert bar.met, bar
    for title, rows in results.items():
        for name, row in rows.items():
            show(title, {name: row} | rows)
            assert "void" not in row, (name, row)
            if row["tool"] == "kdcli" and title != "W2":
                assert row["flops"] == pytest.approx(row["head_flops"], rel=1e-3), name
                assert row["largest"] < row["targets"] * VOCAB, name


def test_a_wrong_gradient_makes_a_row_void() -> None:
    pair, batch, todo = jobs(50)
    right = next(job for job in todo if job.contender.name == "kdcli, JSD")

    def doubled(batch: Batch) -> torch.Tensor:
        assert right.contender.step is not None
        value = right.contender.step(batch)
        for parameter in pair.student.parameters():
            parameter.grad = None if parameter.grad is None else 2 * parameter.grad
        return value

    wrong = Contender(tool="kdcli, doubled", objective="JSD", step=doubled)
    rows = measure(pair, [right, Job(contender=wrong, batch=batch)], 1, CPU)
    assert "void" not in rows["kdcli, JSD"] and rows["kdcli, JSD"]["seconds"] > 0
    assert rows["kdcli, doubled, JSD"]["void"] and rows["kdcli, doubled, JSD"]["loss_error"] < 1e-4
    assert not all(bar.met for bar in bars.check({"any": rows}, CPU))


def test_what_is_not_installed_has_a_row_that_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    pair, batch, todo = jobs(20)
    absent = replace(todo[0].contender, tool="Nobody", objective="JSD", step=None)
    rows = measure(pair, [Job(contender=absent, batch=batch)], 1, CPU)
    show("title", rows)
    assert "not installed" in capsys.readouterr().out


def test_the_losses_of_w6_run_at_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "W6", [(24, 0, ["JSD"]), (48, 0, [])])
    monkeypatch.setattr(loss, "W6_VOCABULARY", 500)
    found = loss.losses(CPU, 0)
    assert [next(iter(rows.values()))["targets"] for rows in found.values()] == [24, 48]
