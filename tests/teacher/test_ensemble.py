"""Mixtures of teachers: against dense float64 sums, at every chunk size and on two ranks; whom a row hears."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from kdcli.api import Batch, Engine, Need, StudentOutput, Teacher, TeacherSignal
from kdcli.errors import ConfigError
from kdcli.objective.forward_kl import ForwardKL
from kdcli.ops.head import Head
from kdcli.ops.mixture import mixed
from kdcli.teacher.ensemble import Ensemble
from kdcli.train.distiller import Distiller
from tests import toys
from tests.distributed import run_ranks

NAMES = ("one", "two", "three")
ROWS = (33, 40, 36)  # of each member's vocabulary, padded differently; 33 ids are real
POOLS: Any = ("probabilities", "logits")


class Counted(toys.ToyTeacher):
    """Counts how often it was asked."""

    asked = 0

    def annotate(self, batch: Batch, needs: Need) -> TeacherSignal:
        self.asked += 1
        return super().annotate(batch, needs)


class Sharded(Counted):
    """Takes the engine, so that ranks run it together."""

    def place(self, engine: Engine) -> None:
        self.engine = engine


def members(kind: type[Counted] = Counted, dtype: torch.dtype = torch.float64) -> dict[str, Teacher]:
    models = [toys.llama(10 + i, width=16 + 8 * i, vocab=rows).to(dtype) for i, rows in enumerate(ROWS)]
    return {name: kind(model, 33) for name, model in zip(NAMES, models, strict=True)}


def log_ps(ensemble: Ensemble, batch: Batch) -> Tensor:
    """[M, B, T, V] in float64, of whole logits."""
    with torch.no_grad():
        logits = [
            one.model(**batch.model_inputs()).logits[..., :33].double()  # pyright: ignore[reportAttributeAccessIssue]
            for one in ensemble.teachers.values()
        ]
    return torch.log_softmax(torch.stack(logits), -1)


def dense(log_p: Tensor, weight: Tensor, pool: str) -> Tensor:
    """The mixture of log_p [M, B, T, V] with weights [M, B, T], as it is defined."""
    weight = weight.unsqueeze(-1)
    if pool == "probabilities":
        return (weight * log_p.exp()).sum(0).log()
    return torch.log_softmax((weight * log_p).sum(0), -1)


def given(ensemble: Ensemble, batch: Batch) -> Tensor:
    """[B, T, V]: log-probabilities as the signal makes them."""
    voices = ensemble.annotate(batch, Need.DISTRIBUTION).voices
    assert voices is not None
    return torch.log_softmax(mixed([(v.weight, v.hidden, v.head) for v in voices], ensemble.pool), -1)


def student() -> toys.ToyStudent:
    return toys.ToyStudent(toys.llama(1))


def loss_and_gradients(
    distiller: Distiller, batches: list[Batch], counts: dict[str, float] | None = None
) -> tuple[float, dict[str, Tensor]]:
    if counts is None:
        counts = {}
        for batch in batches:
            for name, value in distiller.count(batch).items():
                counts[name] = counts.get(name, 0.0) + value
    total = 0.0
    for batch in batches:
        loss, _ = distiller(batch, counts)
        loss.backward()
        total += float(loss.detach())
    return total, {name: p.grad for name, p in distiller.named_parameters() if p.grad is not None}


WEIGHTS = {"one": 1.0, "two": 0.0, "three": 3.0}


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("pool", POOLS)
def test_loss_and_gradient_are_those_of_the_dense_mixture_in_float64(pool: Any, temperature: float) -> None:
    """At every chunk size, in float32; one member has weight 0."""
    exact = Ensemble(teachers=members(), weights=WEIGHTS, pool=pool)
    ensemble = Ensemble(teachers=members(dtype=torch.float32), weights=WEIGHTS, pool=pool)
    batch, objective = toys.batch(), ForwardKL(temperature=temperature)
    reference = student().double()
    weight = torch.tensor([0.25, 0.0, 0.75], dtype=torch.float64).view(3, 1, 1).expand(3, *batch.mask.shape)
    signal = TeacherSignal(logits=dense(log_ps(exact, batch), weight, pool))
    logits = reference.model(**batch.model_inputs()).logits
    expected = objective(batch, StudentOutput(logits=logits), signal)[batch.mask].mean()
    expected.backward()
    gradients = {f"student.{name}": p.grad for name, p in reference.named_parameters()}
    for chunk in (1, 7, 1000):
        distiller = Distiller(student(), ensemble, {"kd": objective}, chunk=chunk)
        value, found = loss_and_gradients(distiller, [batch])
        assert value == pytest.approx(float(expected.detach()), rel=1e-5)
        for name, gradient in found.items():
            torch.testing.assert_close(gradient.double(), gradients[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("pool", POOLS)
def test_a_member_alone_or_twice_is_that_member(pool: Any) -> None:
    batch, teachers = toys.batch(), members()
    for weights in ({"two": 1.0}, {"two": 1.0, "one": 0.0}):
        found = given(Ensemble(teachers=teachers, weights=weights, pool=pool), batch)
        expected = log_ps(Ensemble(teachers=teachers), batch)[1]
        torch.testing.assert_close(found[batch.mask], expected[batch.mask])
    same = given(Ensemble(teachers={"a": teachers["two"], "b": teachers["two"]}, pool=pool), batch)
    torch.testing.assert_close(same[batch.mask], expected[batch.mask])


@pytest.mark.parametrize("pool", POOLS)
def test_a_mixture_of_mixtures_is_a_mixture(pool: Any) -> None:
    batch, teachers = toys.batch(), members()
    inner = Ensemble(
        teachers={name: teachers[name] for name in ("one", "two")}, weights={"one": 1, "two": 3}, pool=pool
    )
    nested = Ensemble(teachers={"both": inner, "three": teachers["three"]}, pool=pool)
    flat = Ensemble(teachers=teachers, weights={"one": 1, "two": 3, "three": 4}, pool=pool)
    torch.testing.assert_close(given(nested, batch), given(flat, batch))


def test_no_voice_is_no_number_that_is_not_finite() -> None:
    """Padding hears nobody; a probability of 0 there would be log 0."""
    model = toys.llama(3)
    hidden = torch.randn(1, 2, 16)
    weight = torch.tensor([[0.0, 1.0]])
    found = mixed([(weight, hidden, Head.of(model)), (0 * weight, hidden, Head.of(model))], "probabilities")
    assert found.isfinite().all()
    assert not found[0, 0].any()


@pytest.mark.parametrize("pool", POOLS)
def test_log_probabilities_are_the_mixtures(pool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdcli.teacher._voices.chunk_size", lambda *_: 3)
    batch = toys.batch()
    ensemble = Ensemble(teachers=members(), weights=WEIGHTS, pool=pool)
    weight = torch.tensor([0.25, 0.0, 0.75], dtype=torch.float64).view(3, 1, 1).expand(3, *batch.mask.shape)
    expected = dense(log_ps(ensemble, batch), weight, pool).gather(-1, batch.targets.unsqueeze(-1)).squeeze(-1)
    found = ensemble.annotate(batch, Need.LOGPROBS).logprobs
    assert found is not None
    torch.testing.assert_close(found.double(), expected * batch.mask, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("per", ["sequence", "target"])
@pytest.mark.parametrize("choose", ["loss", "confidence"])
@pytest.mark.parametrize("sharpness", [None, 0.7])
def test_the_better_member_speaks(choose: Any, per: Any, sharpness: float | None) -> None:
    """The lowest mean loss, or entropy, of the sequence or of the target; or exp(-sharpness x it), normalized."""
    batch = toys.batch(rows=6)
    ensemble = Ensemble(teachers=members(), choose=choose, per=per, sharpness=sharpness)
    log_p = log_ps(ensemble, batch)
    if choose == "loss":
        targets = batch.targets[None, ..., None].expand(3, -1, -1, 1)
        cost = -log_p.gather(-1, targets).squeeze(-1)
    else:
        cost = -(log_p.exp() * log_p).sum(-1)
    cost = cost * batch.mask
    if per == "sequence":
        cost = (cost.sum(-1) / batch.mask.sum(-1))[..., None].expand_as(cost)
    if sharpness is None:
        weight = torch.nn.functional.one_hot(cost.argmin(0), 3).permute(2, 0, 1).double()
        assert len(cost.argmin(0)[batch.mask].unique()) > 1, "else nothing was chosen"
    else:
        weight = torch.softmax(-sharpness * cost, 0)
    expected = dense(log_p, weight, "probabilities")
    torch.testing.assert_close(given(ensemble, batch)[batch.mask], expected[batch.mask], rtol=1e-6, atol=1e-6)


def test_rows_hear_whom_their_domain_names() -> None:
    teachers = members()
    table: Any = {"a": "two", "b": {"one": 1, "three": 3}}
    by_table = Ensemble(teachers=teachers, choose="domain", domains=table)
    batch = toys.batch(domains=("a", "b"))
    log_p = log_ps(by_table, batch)
    weight = torch.zeros(3, 4, 12, dtype=torch.float64)
    weight[1, 0::2] = 1.0
    weight[0, 1::2], weight[2, 1::2] = 0.25, 0.75
    expected = dense(log_p, weight, "probabilities")
    torch.testing.assert_close(given(by_table, batch)[batch.mask], expected[batch.mask])
    named = given(Ensemble(teachers=teachers, choose="name"), toys.batch(domains=("three",)))
    torch.testing.assert_close(named[batch.mask], log_p[2][batch.mask])
    rest = Ensemble(teachers=teachers, choose="domain", domains={"a": "two"}, weights={"three": 1})
    torch.testing.assert_close(given(rest, batch)[1::2][batch.mask[1::2]], log_p[2][1::2][batch.mask[1::2]])


class Ranks:
    """As many ranks as an engine says there are."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size


def test_who_is_not_heard_is_not_run_unless_ranks_must_run_together() -> None:
    for kind, world_size, expected in ((Counted, 2, [0, 1, 0]), (Sharded, 1, [0, 1, 0]), (Sharded, 2, [1, 1, 1])):
        teachers: Any = members(kind)
        ensemble = Ensemble(teachers=teachers, choose="name")
        ensemble.place(Ranks(world_size))  # type: ignore[arg-type]
        signal = ensemble.annotate(toys.batch(domains=("two",)), Need.DISTRIBUTION)
        assert [one.asked for one in teachers.values()] == expected
        assert signal.voices is not None
        assert len(signal.voices) == 1


def test_scores_compare_with_the_mixture() -> None:
    batch = toys.batch()
    ensemble = Ensemble(teachers=members())
    distiller = Distiller(student(), ensemble, {}, chunk=5)
    scores = distiller(batch, mode="score")
    log_p = dense(
        log_ps(ensemble, batch), torch.full((3, *batch.mask.shape), 1 / 3, dtype=torch.float64), "probabilities"
    )
    with torch.no_grad():
        log_q = torch.log_softmax(distiller.student.model(**batch.model_inputs()).logits, -1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1) * batch.mask
    torch.testing.assert_close(scores.kl.double(), kl, rtol=1e-5, atol=1e-6)
    assert torch.equal(scores.agree.bool(), (log_p.argmax(-1) == log_q.argmax(-1)) & batch.mask)


def two_ranks() -> tuple[float, float]:
    """The loss of both ranks' rows, and the norm of the gradient's sum."""
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    table: Any = {"a": "two", "b": {"one": 1, "three": 3}}
    ensemble = Ensemble(teachers=members(dtype=torch.float32), choose="domain", domains=table)
    distiller = Distiller(student(), ensemble, {"kd": ForwardKL()}, chunk=4)
    whole = toys.batch(rows=4)
    counts = distiller.count(whole)
    mine = [toys.rows_of(whole, row, row + 1) for row in range(rank, 4, size)]
    value, gradients = loss_and_gradients(distiller, mine, counts)
    total = torch.tensor(value, dtype=torch.float64)
    torch.distributed.all_reduce(total)
    for gradient in gradients.values():
        torch.distributed.all_reduce(gradient)
    return float(total), math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))


def test_two_ranks_give_the_loss_and_gradient_of_one() -> None:
    """Each rank's rows are of one domain."""
    (alone,) = run_ranks(1, two_ranks)
    for both in run_ranks(2, two_ranks):
        assert both == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": {"tow": 1.0}}, "no teacher tow; there are one, two, three"),
        ({"weights": {"one": -1.0}}, "one has weight -1.0"),
        ({"weights": {"one": 0.0}}, "no teacher has a weight above 0"),
        ({"choose": "domain"}, "needs a table"),
        ({"domains": {"a": "one"}}, "has no effect with choose=all"),
        ({"choose": "domain", "domains": {"a": "four"}}, "no teacher four"),
        ({"sharpness": 1.0}, "have an effect with choose=loss or confidence only"),
        ({"choose": "loss", "sharpness": 0.0}, "is 0.0"),
        ({"choose": "loss", "weights": {"one": 1.0}}, "or set teacher.sharpness"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Ensemble(teachers=members(), **settings)


def test_teachers_that_cannot_be_mixed_are_refused() -> None:
    class Sparse(toys.ToyTeacher):
        provides = Need.DISTRIBUTION | Need.LOGPROBS

    with pytest.raises(ConfigError, match="two or more, not 1"):
        Ensemble(teachers={"one": members()["one"]})
    with pytest.raises(ConfigError, match=r"teachers\.top: Sparse gives no logits"):
        Ensemble(teachers={**members(), "top": Sparse(toys.llama(1))})
    other = Ensemble(teachers=members(), pool="logits")
    with pytest.raises(ConfigError, match="averages logits"):
        Ensemble(teachers={"a": other, "b": members()["one"]}).annotate(toys.batch(), Need.DISTRIBUTION)


def test_a_domain_without_a_teacher_is_refused_before_a_run() -> None:
    by_name = Ensemble(teachers=members(), choose="name")
    by_name.check_domains(["one", "three"])
    with pytest.raises(ConfigError, match="no teacher has the name of domain code"):
        by_name.check_domains(["one", "code"])
    with pytest.raises(ConfigError, match="says nothing of domain b"):
        Ensemble(teachers=members(), choose="domain", domains={"a": "one"}).check_domains(["a", "b"])
