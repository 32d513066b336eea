"""When weights are made, what they act on, what a scheduler is shown; and that a run goes on exactly across them."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kdcli.domain_scheduler.ddk
from kdcli.api import Batch, DomainLoss, DomainScheduler, Objective
from kdcli.errors import ConfigError
from kdcli.objective.cross_entropy import CrossEntropy
from kdcli.objective.forward_kl import ForwardKL
from kdcli.train.distiller import Distiller
from kdcli.train.domains import Domains
from kdcli.train.loader import Loader, normalized
from tests import runs, toys
from tests.domain_scheduler.options import node
from tests.train.test_loader import rows

ROWS = {"code": rows("code", 17), "math": rows("math", 5), "prose": rows("prose", 3)}
TERMS = {"kd": ForwardKL(weight=0.25), "ce": CrossEntropy(weight=0.5)}


class Follow(DomainScheduler):
    """Weights in proportion to what the student loses; remembers what it was shown."""

    signals = frozenset({"student"})

    def __init__(self, interval: int = 2, actuator: Any = "resample") -> None:
        self.interval, self.actuator = interval, actuator
        self.shown: list[dict[str, DomainLoss]] = []

    def first(self, weights: Mapping[str, float], losses: Mapping[str, DomainLoss]) -> dict[str, float]:
        return self.update(weights, losses)

    def update(self, weights: Mapping[str, float], losses: Mapping[str, DomainLoss]) -> dict[str, float]:
        self.shown.append(dict(losses))
        return {name: loss.student for name, loss in losses.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"times": len(self.shown)}


class Said:
    """A probe that says what it is told to, step by step."""

    seconds, teacher, scores_student = 0.5, None, True
    held_out = SimpleNamespace(content={"code": "a", "math": "b", "prose": "c"})

    def __init__(self, *values: Mapping[str, float]) -> None:
        self.values = list(values)
        self.asked: list[int] = []

    def __call__(self, step: int) -> dict[str, DomainLoss]:
        self.asked.append(step)
        return {
            name: DomainLoss(student=value, teacher=1.0) for name, value in self.values[len(self.asked) - 1].items()
        }


def domains(scheduler: DomainScheduler, probe: Any = None, data: Any = None) -> Domains:
    data = data or ROWS
    sizes = {name: len(own) for name, own in data.items()}
    loader = Loader(data, batch_size=8, micro_size=4, pad_id=0, seed=1, weights=scheduler.initial(sizes))
    return Domains(scheduler, loader, TERMS, probe)


def sums(**per_domain: tuple[float, float, float, float]) -> dict[str, float]:
    """What ranks add up: of each domain its targets, share (of both terms), mean of kd and mean of ce."""
    found = {}
    for name, (targets, share, kd, ce) in per_domain.items():
        found |= {f"domain/{name}/targets": targets}
        for term, mean in (("kd", kd), ("ce", ce)):
            found |= {f"domain/{name}/share/{term}": share, f"domain/{name}/loss/{term}": share * mean}
    return found


ALIKE = {"code": 2.0, "math": 1.0, "prose": 1.0}
ODD = {"code": 0.0, "math": 3.0, "prose": 1.0}


def test_weights_are_made_before_the_first_step_and_after_each_interval_once() -> None:
    probe = Said(ALIKE, ODD, ALIKE)
    one = domains(Follow(interval=2), probe)
    for step in range(5):
        one.update(step)
        one.update(step)  # as after an interrupted evaluation
        if step < 2:
            assert one.loader.weights == one.weights == {"code": 0.5, "math": 0.25, "prose": 0.25}
        elif step < 4:
            assert one.weights == {"code": 0.0, "math": 0.75, "prose": 0.25}
    assert probe.asked == [0, 2, 4]


def test_without_a_signal_that_needs_one_there_is_no_probe_and_no_first_weights() -> None:
    scheduler = Follow(interval=3)
    one = domains(scheduler)
    one.update(0)
    assert scheduler.shown == []
    one.loader.next(0)
    one.observe(sums(code=(30, 0.75, 2, 4), math=(10, 0.25, 1, 1)))
    with pytest.raises(ConfigError, match="weight of domain code is nan"):
        one.update(3)
    [shown] = scheduler.shown
    assert math.isnan(shown["code"].student)
    assert (shown["code"].tokens, shown["math"].tokens, shown["prose"].tokens) == (0.75, 0.25, 0.0)


def test_a_scheduler_is_shown_the_training_since_the_last_update() -> None:
    """Losses are 0.25 kd + 0.5 ce: of code 2.5 over 30 targets, then 1.25 over 10: (75 + 12.5) / 40 = 2.1875."""
    scheduler = Follow(interval=2)
    one = domains(scheduler, Said(ALIKE, ALIKE, ALIKE))
    one.update(0)
    assert scheduler.shown[0]["code"].trained is None and scheduler.shown[0]["code"].tokens is None
    one.observe(sums(code=(30, 0.75, 2, 4), math=(10, 0.25, 1, 1)))
    one.observe(sums(code=(10, 1.0, 1, 2)))
    one.update(2)
    shown = scheduler.shown[1]
    assert shown["code"].trained == pytest.approx(2.1875)
    assert shown["code"].tokens == pytest.approx(0.8)
    assert shown["math"].trained == pytest.approx(0.75)
    assert shown["prose"].trained is None and shown["prose"].tokens == 0.0
    one.update(4)
    assert scheduler.shown[2]["code"].trained is None, "nothing since"


def test_metrics_of_a_step_are_shares_and_means_per_domain() -> None:
    one = domains(Follow(), Said(ALIKE))
    one.next(1)
    found = one.observe(sums(code=(30, 0.6, 2, 4), math=(10, 0.2, 1, 1)))
    assert found["domain/code/loss"] == pytest.approx(2.5)
    assert found["domain/code/token_share"] == 0.75
    assert found["domain/code/gradient_share"] == pytest.approx(0.75)
    assert found["domain/prose/gradient_share"] == 0.0
    assert "domain/prose/loss" not in found
    assert sum(found[f"domain/{name}/prompt_share"] for name in ROWS) == pytest.approx(1.0)
    drawn = {name: found[f"domain/{name}/prompt_share"] * 8 for name in ROWS}
    assert drawn == pytest.approx(one.loader.drawn)
    epochs = {name: count / len(ROWS[name]) for name, count in one.loader.drawn.items()}
    assert {name: found[f"domain/{name}/epoch"] for name in ROWS} == epochs


def test_reweight_draws_as_before_and_multiplies_losses() -> None:
    """Initial weights are 17, 5 and 3 of 25; the new ones 0.5, 0.25 and 0.25."""
    one, plain = domains(Follow(actuator="reweight"), Said(ALIKE)), domains(Follow(interval=0))
    one.update(0)
    assert one.loader.weights == plain.loader.weights
    factor = {"code": 0.5 * 25 / 17, "math": 0.25 * 25 / 5, "prose": 0.25 * 25 / 3}
    for step in range(6):
        for reweighted, drawn in zip(one.weigh(one.next(step))[0], plain.next(step), strict=True):
            assert reweighted.row == drawn.row
            expected = [weight * factor[name] for weight, name in zip(drawn.weight.tolist(), drawn.domain, strict=True)]
            assert reweighted.weight.tolist() == pytest.approx(expected)


def test_either_actuator_gives_domains_the_same_expected_share_of_the_loss() -> None:
    """Over 500 steps of 8 rows, three standard deviations of a domain's share of the weights are below .04."""
    shares = {}
    for actuator in ("resample", "reweight"):
        one = domains(Follow(actuator=actuator), Said(ALIKE))
        one.update(0)
        total = dict.fromkeys(ROWS, 0.0)
        for step in range(500):
            for batch in one.weigh(one.next(step))[0]:
                for name, weight in zip(batch.domain, batch.weight.tolist(), strict=True):
                    total[name] += weight / 4000
        shares[actuator] = total
    for name, value in {"code": 0.5, "math": 0.25, "prose": 0.25}.items():
        assert shares["resample"][name] == pytest.approx(value, abs=0.04)
        assert shares["reweight"][name] == pytest.approx(value, abs=0.04)


def reweighing(weights: Mapping[str, float], terms: Mapping[str, Objective]) -> Domains:
    one = domains(Follow(actuator="reweight"))
    one.terms = terms
    one.weights = normalized(weights, ROWS)
    return one


def lengths_apart() -> Batch:
    """Six rows of three domains; of `math` each has one target, of the others up to eighteen."""
    batch = toys.batch(rows=6, length=20, domains=tuple(ROWS))
    math_rows = torch.tensor([name == "math" for name in batch.domain])
    batch.mask[math_rows] = torch.arange(20) == 4
    batch.weight = torch.linspace(0.5, 1.5, 6)
    return batch


def stepped(one: Domains, distiller: Distiller, parts: Sequence[Batch]) -> tuple[float, list[torch.Tensor]]:
    """A step's loss and gradients, as the loop forms them."""
    distiller.zero_grad()
    counted: Counter[str] = Counter()
    weighed, total = [], 0.0
    for part in parts:  # as ranks do it, each by itself
        [batch], amounts = one.weigh([part])
        counted.update(distiller.count(batch) | amounts)
        weighed.append(batch)
    counts = one.fair(counted)
    for batch in weighed:
        loss, _ = distiller(batch, counts)
        loss.backward()
        total += float(loss.detach())
    return total, [p.grad.clone() for p in distiller.parameters() if p.grad is not None]


BOTH = {"kd": CrossEntropy(weight=0.25), "ce": CrossEntropy(weight=0.5, reduction="sequence")}
EQUAL = toys.ToyStudent(toys.llama(1, tied=False))
EQUAL.model.lm_head.weight.data.zero_()  # every target costs log V


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=3, max_size=3), st.floats(1e-6, 1.0))
def test_domains_of_equal_loss_have_that_loss_under_any_weights(some: list[float], least: float) -> None:
    one = reweighing(dict(zip(ROWS, [value + (value == max(some)) * least for value in some], strict=True)), BOTH)
    distiller, batch = Distiller(EQUAL, toys.ToyTeacher(toys.llama(2)), BOTH), lengths_apart()
    plain, _ = stepped(domains(Follow()), distiller, [batch])
    assert stepped(one, distiller, [batch])[0] == pytest.approx(plain, rel=1e-5)


def test_a_step_whose_rows_all_weigh_nothing_has_no_loss() -> None:
    distiller = Distiller(EQUAL, toys.ToyTeacher(toys.llama(2)), BOTH)
    loss, gradients = stepped(
        reweighing({"code": 0, "math": 0, "prose": 1}, BOTH), distiller, [toys.batch(domains=("code",))]
    )
    assert loss == 0 and all(not gradient.any() for gradient in gradients)


def test_reweighing_does_not_depend_on_how_a_step_is_cut() -> None:
    terms = {**BOTH, "kl": ForwardKL()}
    distiller = Distiller(toys.ToyStudent(toys.llama(1)), toys.ToyTeacher(toys.llama(2)), terms)
    one, batch = reweighing({"code": 0.1, "math": 0.7, "prose": 0.2}, terms), lengths_apart()
    loss, gradients = stepped(one, distiller, [batch])
    assert loss != pytest.approx(stepped(domains(Follow()), distiller, [batch])[0], rel=1e-3)
    for cuts in ([1, 2, 6], [5, 6], list(range(1, 7))):
        parts = [toys.rows_of(batch, start, stop) for start, stop in zip([0, *cuts], cuts, strict=False)]
        again, parts_gradients = stepped(one, distiller, parts)
        assert again == pytest.approx(loss, rel=1e-5)
        for part, whole in zip(parts_gradients, gradients, strict=True):
            torch.testing.assert_close(part, whole, rtol=1e-4, atol=1e-6)


def test_a_run_that_reweighs_is_the_same_on_two_ranks(tmp_path: Path) -> None:
    """Rows of `verse` are of one token; its share of the loss, and of its gradient, becomes half."""
    changes = {
        "run__steps": 3,
        "objective": {"ce": {"_target_": "kdcli.objective.cross_entropy.CrossEntropy"}},
        "batch__size": 8,
        "domain_scheduler": node("token_share", quota="hamilton"),
        "student_init__config__attention_dropout": 0.0,
    }
    told = []
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        (folder / "data").mkdir(parents=True)
        for name, words in (("prose", 20), ("verse", 1)):
            rows = [{"prompt": "say", "response": " ".join(runs.WORDS[i : i + words])} for i in range(20)]
            (folder / f"data/{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        run_dir = runs.write_run(folder, **changes)
        assert runs.work(run_dir, ranks=ranks) == [0] * ranks
        told.append([line for line in runs.lines(run_dir) if line["step"]])
    for one, two in zip(*told, strict=True):
        assert two == pytest.approx(one, rel=1e-4)
        parts = [one[f"domain/{n}/loss"] * one[f"domain/{n}/gradient_share"] for n in ("prose", "verse")]
        assert one["loss/total"] == pytest.approx(sum(parts), rel=1e-5)
    assert told[0][0]["domain/verse/gradient_share"] < 0.25 < told[0][-1]["domain/verse/gradient_share"]


def test_one_domain_alone_keeps_all_the_weight_and_says_nothing_of_shares() -> None:
    one = domains(Follow(), Said({"code": 3.0}, {"code": 2.0}), {"code": ROWS["code"]})
    one.update(0)
    one.next(1)
    assert one.observe(sums(code=(10, 1.0, 1, 1))) == {}
    one.update(2)
    assert one.weights == {"code": 1.0}


def test_a_probe_that_is_not_finite_is_told_and_cannot_become_a_weight(caplog: pytest.LogCaptureFixture) -> None:
    one = domains(Follow(), Said({**ALIKE, "math": math.nan}))
    with pytest.raises(ConfigError, match="weight of domain math is nan"):
        one.update(0)
    assert "probe of domain math is not finite (student)" in caplog.text


def test_ddk_keeps_the_last_number_of_a_domain_whose_probe_is_not_finite() -> None:
    def weights(second: Mapping[str, float]) -> dict[str, float]:
        one = domains(kdcli.domain_scheduler.ddk.DDK(interval=1), Said(ALIKE, second))
        one.update(0)
        one.update(1)
        return one.weights

    assert weights({**ALIKE, "math": math.nan}) == weights(ALIKE)
    broken = domains(kdcli.domain_scheduler.ddk.DDK(interval=1), Said({**ALIKE, "math": math.nan}))
    with pytest.raises(ConfigError, match="domain math is nan at its first probe"):
        broken.update(0)


def test_what_a_probe_found_is_told_once() -> None:
    one = domains(Follow(), Said(ODD))
    one.update(0)
    assert one.news["probe/seconds"] == 0.5
    assert one.news["probe/math/gap"] == 2.0
    assert one.news["probe/math/ppl_ratio"] == pytest.approx(math.exp(2.0))
    assert "probe/math/trained" not in one.news


@pytest.mark.parametrize("stop", [1, 2, 3])
@pytest.mark.parametrize("actuator", ["resample", "reweight"])
def test_state_goes_on_in_the_middle_of_an_interval(stop: int, actuator: str) -> None:
    said = [ALIKE, {"code": 0.1, "math": 0.7, "prose": 0.1}, ODD]

    def go(one: Domains, steps: range) -> list[Any]:
        found = []
        for step in steps:
            one.update(step)
            batches, _ = one.weigh(one.next(step))
            found.append((one.weights, [(b.row, b.weight.tolist()) for b in batches]))
            one.observe(sums(code=(30 + step, 0.75, 2, 4), math=(10, 0.25, 1, 1)))
        return found

    whole, first, second = (domains(Follow(actuator=actuator), Said(*said[n:])) for n in (0, 0, 1 + (stop > 2)))
    expected = go(whole, range(6))
    found = go(first, range(stop))
    kept = json.loads(json.dumps([first.loader.state_dict(), first.state_dict()]))
    second.loader.load_state_dict(kept[0])
    second.load_state_dict(kept[1])
    assert found + go(second, range(stop, 6)) == expected
    scheduler: Any = second.scheduler
    assert scheduler.shown == whole.scheduler.shown[-len(scheduler.shown) :]  # pyright: ignore


def test_other_held_out_rows_than_the_checkpoint_s_are_refused_by_domain() -> None:
    one = domains(Follow(), Said(ALIKE))
    state = one.state_dict() | {"held_out": {"code": "a", "math": "other", "prose": "c"}}
    with pytest.raises(ConfigError, match=r"probe\.data: the held-out rows of domain math have changed"):
        one.load_state_dict(state)


DDK = {"_target_": "kdcli.domain_scheduler.ddk.DDK", "interval": 2, "first_interval": "r0"}


@pytest.mark.parametrize(("ranks", "stage"), [(1, 2), (1, 3), (2, 2), (2, 3)])
def test_a_run_goes_on_exactly_across_updates(ranks: int, stage: int, tmp_path: Path) -> None:
    """Interrupted in the probe after step 2, then killed in step 5, after the update at step 4."""
    changes = {"run__steps": 6, "engine__stage": stage, "domain_scheduler": DDK}
    whole = runs.write_run(tmp_path / "whole", **changes)
    assert runs.work(whole, ranks=ranks) == [0] * ranks
    stopped = runs.write_run(tmp_path / "stopped", **changes)
    if ranks == stage - 1:  # spared where only the engine differs
        assert runs.work(stopped, ranks=ranks, fault="probe:rank=0:step=2:int") == [130] * ranks
        assert runs.checkpoints(stopped) == ["step-000002"]
    assert runs.work(stopped, ranks=ranks, fault="step.optim:step=5:kill") == [None] * ranks
    teacher = (stopped / "probe.json").stat()
    assert runs.work(stopped, ranks=ranks) == [0] * ranks
    assert runs.lines(stopped) == runs.lines(whole)
    assert (stopped / "probe.json").stat() == teacher
    ends = [json.loads((run / "checkpoints/step-000006/state.json").read_text()) for run in (whole, stopped)]
    for part in ("loader", "domains"):
        told = [end[part] | {"news": {}} for end in ends]
        assert told[0] == told[1]
    weights = [line["domain/prose/weight"] for line in runs.lines(whole)[1:]]
    assert len(set(weights)) == 3, "new ones before steps 1, 3 and 5"


def test_shares_of_the_gradient_and_losses_make_up_the_loss(tmp_path: Path) -> None:
    objective = {
        "kd": {"_target_": "kdcli.objective.forward_kl.ForwardKL", "weight": 0.25},
        "ce": {"_target_": "kdcli.objective.cross_entropy.CrossEntropy", "weight": 0.5},
    }
    changes = {"objective": objective, "run__steps": 3, "run__save_every": 0, "batch__packing": True}
    run_dir = runs.write_run(tmp_path, **changes, domain_scheduler={**DDK, "interval": 1, "actuator": "reweight"})
    assert runs.work(run_dir) == [0]
    for line in runs.lines(run_dir)[1:]:
        parts = [
            line[f"domain/{name}/loss"] * line[f"domain/{name}/gradient_share"]
            for name in ("prose", "verse")
            if f"domain/{name}/loss" in line
        ]
        assert line["loss/total"] == pytest.approx(sum(parts), rel=1e-4)
