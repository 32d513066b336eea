"""TAID, rankings, sampled ids, two tasks and correlations: what is particular to each."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import kdcli.objective.dist as dist_module
from kdcli.api import Batch, Objective, StudentOutput, TeacherSignal, TopK
from kdcli.errors import ConfigError
from kdcli.objective.cross_entropy import CrossEntropy
from kdcli.objective.dist import DIST
from kdcli.objective.forward_kl import ForwardKL
from kdcli.objective.hinge_ranking import HingeRanking
from kdcli.objective.logistic_ranking import LogisticRanking
from kdcli.objective.sampled import Sampled
from kdcli.objective.step_by_step import StepByStep
from kdcli.objective.taid import TAID
from kdcli.ops.draws import keys_of, mixed, uniform
from kdcli.ops.head import Head
from kdcli.train.conformance import oracles, oracles_tokens
from tests.objective.chunks import V, chunk, stored
from tests.toys import batch as toy_batch


def both(objective: Objective, batch: Batch, z: Tensor, teacher: TeacherSignal) -> tuple[Tensor, Tensor]:
    """Values and gradient, by autograd and by the closed form, which agree."""
    leaf = z.clone().requires_grad_()
    value = objective(batch, StudentOutput(logits=leaf), teacher)
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    with torch.no_grad():
        closed = objective.closed_form(batch, StudentOutput(logits=z.clone()), teacher)
    assert closed is not None
    torch.testing.assert_close(closed[0], value.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(closed[1], gradient, rtol=1e-10, atol=1e-12)
    return closed


def by_oracle(oracle: Callable[..., float], batch: Batch, y: Tensor, z: Tensor, **settings: Any) -> Tensor:
    rows = zip(y[0].numpy(), z[0].numpy(), batch.targets[0].tolist(), strict=True)
    return torch.tensor([[oracle(a, b, t, **settings) for a, b, t in rows]], dtype=torch.float64)


# ---------------------------------------------------------------------------------------------- TAID


@pytest.mark.parametrize("t", [0.0, 0.2, 0.4, 1.0])
def test_taid_is_the_kl_to_the_interpolated_teacher_and_its_gradient_holds_that_teacher(t: float) -> None:
    batch, y, z = chunk()
    value, gradient = both(TAID(t=t), batch, z, TeacherSignal(logits=y))
    torch.testing.assert_close(value, by_oracle(oracles.taid, batch, y, z, t=t))
    torch.testing.assert_close(gradient, torch.softmax(z, -1) - torch.softmax((1 - t) * z + t * y, -1))


def test_taid_ends_as_forward_kl_and_begins_as_nothing() -> None:
    batch, y, z = chunk()
    teacher = TeacherSignal(logits=y)
    for one, other in zip(
        both(TAID(t=1.0), batch, z, teacher), both(ForwardKL(), batch, z, TeacherSignal(logits=y)), strict=True
    ):
        torch.testing.assert_close(one, other)
    for nothing in both(TAID(t=0.0), batch, z, teacher):
        assert nothing.abs().max() < 1e-14


def test_taids_gradient_is_that_of_the_official_cross_entropy() -> None:
    """Leaving out H(p_t), which is held fixed, changes the value alone."""
    batch, y, z = chunk()
    leaf = z.clone().requires_grad_()
    p_t = torch.softmax(0.6 * leaf.detach() + 0.4 * y, -1)
    (expected,) = torch.autograd.grad(-(p_t * torch.log_softmax(leaf, -1)).sum(), leaf)
    torch.testing.assert_close(both(TAID(), batch, z, TeacherSignal(logits=y))[1], expected)


@pytest.mark.parametrize("missing", ["tail", "renormalize", "teacher_only"])
def test_taid_of_a_top_k_teacher_has_a_closed_form(missing: str) -> None:
    batch, y, z = chunk()
    for k in (1, 5, V):
        both(TAID(missing=missing), batch, z, stored(y, k))  # pyright: ignore[reportArgumentType]


def test_following_taids_teacher_leads_to_the_teacher() -> None:
    """Its own value may rise on the way, as here: p_t moves on with the student, and where it gets sharper more is at
    stake. The distance from the teacher itself falls."""
    batch, _, _ = chunk(20)
    y = 4 * torch.randn(1, 20, 2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z, values, distances = torch.zeros_like(y), [], []
    for _ in range(60):
        student, teacher = StudentOutput(logits=z), TeacherSignal(logits=y)
        value, gradient = TAID().closed_form(batch, student, teacher) or (None, None)
        assert value is not None and gradient is not None
        values.append(value.mean().item())
        distances.append(ForwardKL()(batch, student, teacher).mean().item())
        z = z - gradient
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 0.5 * distances[0]
    assert max(values) > 1.02 * values[0]


def test_taid_reads_t_when_it_is_used() -> None:
    batch, y, z = chunk()
    moved = TAID(t=0.4)
    moved.t = 0.9
    torch.testing.assert_close(
        both(moved, batch, z, TeacherSignal(logits=y)), both(TAID(t=0.9), batch, z, TeacherSignal(logits=y))
    )


# ---------------------------------------------------------------------------------------------- rankings

RANKINGS = [
    (HingeRanking(), oracles.hinge_ranking, {"margin": 1.0}),
    (HingeRanking(margin=0.3), oracles.hinge_ranking, {"margin": 0.3}),
    (HingeRanking(margin=None), oracles.hinge_ranking, {"margin": None}),
    (LogisticRanking(), oracles.logistic_ranking, {}),
]


@pytest.mark.parametrize(("objective", "oracle", "settings"), RANKINGS, ids=lambda x: getattr(x, "__name__", ""))
@pytest.mark.parametrize("top_k", [2, 8, V, V + 5])
def test_rankings_are_their_formula(objective: Any, oracle: Callable[..., float], settings: dict, top_k: int) -> None:
    batch, y, z = chunk()
    objective.top_k = top_k
    value, gradient = both(objective, batch, z, TeacherSignal(logits=y))
    torch.testing.assert_close(value, by_oracle(oracle, batch, y, z, top_k=top_k, **settings))
    assert gradient.sum(-1).abs().max() < 1e-12
    assert torch.autograd.gradcheck(
        lambda z: objective(batch, StudentOutput(logits=z), TeacherSignal(logits=y)), z.clone().requires_grad_()
    )


@pytest.mark.parametrize(("objective", "oracle", "settings"), RANKINGS, ids=lambda x: getattr(x, "__name__", ""))
def test_a_top_k_teacher_ranks_as_its_logits_do(objective: Any, oracle: object, settings: dict) -> None:
    """Also where it gives more ids than are asked for, and at whatever temperature they were stored."""
    batch, y, z = chunk()
    objective.top_k = 5
    dense = both(objective, batch, z, TeacherSignal(logits=y))
    for k in (5, 9):
        torch.testing.assert_close(both(objective, batch, z, stored(y, k)), dense)
    if settings.get("margin", 0.0) is not None:
        torch.testing.assert_close(both(objective, batch, z, stored(y, 5, 3.0)), dense)


def test_rankings_worked_out_by_hand() -> None:
    """The teacher says 0 > 1 > 2 at logits (1, 3, 0): gaps -2, 1, 3; hinges of margin 2 are 4, 1, 0."""
    batch, _, _ = chunk(1)
    y, z = torch.tensor([[[9.0, 8.0, 7.0]]]), torch.tensor([[[1.0, 3.0, 0.0]]])
    hinge, slope = both(HingeRanking(margin=2.0), batch, z.double(), TeacherSignal(logits=y.double()))
    assert hinge.item() == pytest.approx(5 / 3)
    assert slope[0, 0].tolist() == pytest.approx([-2 / 3, 1 / 3, 1 / 3])
    logistic = LogisticRanking()(batch, StudentOutput(logits=z), TeacherSignal(logits=y)).item()
    assert logistic == pytest.approx(sum(math.log1p(math.exp(-gap)) for gap in (-2, 1, 3)) / 3, rel=1e-6)


def test_a_student_in_the_teachers_order_by_the_margin_has_no_hinge_loss() -> None:
    batch, y, _ = chunk()
    assert both(HingeRanking(margin=None), batch, y, TeacherSignal(logits=y))[0].abs().max() == 0
    assert both(HingeRanking(margin=None), batch, 2 * y, TeacherSignal(logits=y))[0].abs().max() == 0
    assert both(HingeRanking(margin=None), batch, 0.5 * y, TeacherSignal(logits=y))[0].min() > 0


def test_ties_of_the_teacher_are_no_pairs() -> None:
    batch, _, z = chunk(1)
    for objective in (HingeRanking(), LogisticRanking()):
        value, gradient = both(objective, batch, z, TeacherSignal(logits=torch.zeros_like(z)))
        assert value.item() == 0
        assert gradient.abs().max() == 0
        one = TopK(ids=torch.tensor([[[3]]]), logprobs=torch.zeros(1, 1, 1, dtype=torch.float64))
        assert both(objective, batch, z, TeacherSignal(topk=one))[0].item() == 0


# ---------------------------------------------------------------------------------------------- sampled


def splitmix(x: int) -> int:
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def test_draws_are_splitmix64s() -> None:
    """Its first numbers after seed 0, as published; and keys mixed in plain integers."""
    stream = uniform(torch.tensor([0]), 3)[0]
    published = (0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F)
    assert stream.tolist() == [(x >> 11) / 2**53 for x in published]
    key = int.from_bytes(hashlib.blake2b(b"5/some row", digest_size=8).digest(), "little")
    for value in (7, 11):
        key = splitmix(key ^ splitmix(value + 0x9E3779B97F4A7C15))
    ours = mixed(keys_of(["some row"], 5, torch.device("cpu")), torch.tensor([7]), torch.tensor([11]))
    assert int(ours) % 2**64 == key


def test_draws_are_uniform_and_do_not_repeat() -> None:
    rows = keys_of([f"row{i}" for i in range(50)], 0, torch.device("cpu"))
    key = mixed(rows.unsqueeze(-1), torch.arange(200).expand(50, 200))
    numbers = uniform(key, 10)
    counts = torch.histc(numbers.flatten(), bins=20, min=0, max=1)
    expected = numbers.numel() / 20
    assert ((counts - expected).square() / expected).sum() < 43.8  # chi squared of 19 degrees, 1 in 1000
    assert numbers.unique().numel() == numbers.numel()
    assert torch.corrcoef(numbers.flatten(0, 1).T)[0, 1:].abs().max() < 0.04


@pytest.mark.parametrize("settings", [{}, {"tau": 0.6, "samples": 6, "seed": 3}, {"temperature": 2.0, "samples": 1}])
def test_sampled_is_the_weighted_cross_entropy_of_ids_drawn_one_by_one(settings: dict[str, Any]) -> None:
    batch, y, z = chunk()
    value, _ = both(Sampled(**settings), batch, z, TeacherSignal(logits=y))
    known = {"samples": 50, "tau": 1.0, "seed": 0, "temperature": 1.0, "temperature_scale": "none", **settings}
    shown = SimpleNamespace(
        **{n: getattr(batch, n).numpy() for n in ("input_ids", "targets", "segment")}, row=batch.row
    )
    models = (SimpleNamespace(logits=logits.numpy()) for logits in (z, y))
    np.testing.assert_allclose(value.numpy(), oracles_tokens.sampled(shown, *models, **known), rtol=1e-11)


def test_sampled_is_unbiased_at_tau_one() -> None:
    """Over 2,000 seeds the means of value and gradient are the cross-entropy with p and q - p, within four standard
    errors; the gradient of one seed is far from it."""
    batch, y, z = chunk(3)
    q, p = torch.softmax(z, -1), torch.softmax(y, -1)
    seeds = 2000
    values, gradients = zip(
        *(
            Sampled(samples=4, seed=s).closed_form(batch, StudentOutput(logits=z), TeacherSignal(logits=y))
            for s in range(seeds)
        ),
        strict=True,
    )
    value, gradient = torch.stack(values), torch.stack(gradients)
    expected = -(p * torch.log_softmax(z, -1)).sum(-1)
    assert ((value.mean(0) - expected).abs() < 4 * value.std(0) / math.sqrt(seeds)).all()
    error = (p * (1 - p) / (4 * seeds)).sqrt()  # of four independent draws; of stratified ones it is smaller
    assert ((gradient.mean(0) - (q - p)).abs() < 4 * error + 2 / (4 * seeds)).all()  # a rare id comes in whole draws
    assert (gradients[0] - (q - p)).abs().max() > 0.05


def test_importance_weights_correct_another_proposal() -> None:
    """With many samples the self-normalised weights give p again, whatever tau."""
    batch, y, z = chunk(3)
    for tau in (0.5, 1.0, 1.5):
        _, gradient = both(Sampled(samples=20000, tau=tau), batch, z, TeacherSignal(logits=y))
        torch.testing.assert_close(gradient, torch.softmax(z, -1) - torch.softmax(y, -1), rtol=0, atol=2e-3)


def test_draws_do_not_depend_on_the_cut_of_a_step() -> None:
    batch, y, z = chunk()
    objective = Sampled(samples=5)
    whole = objective(batch, StudentOutput(logits=z), TeacherSignal(logits=y))
    for n in range(z.shape[1]):
        window = slice(n, n + 1)
        names = ("input_ids", "targets", "mask", "attention_mask", "segment")
        one = replace(batch, **{name: getattr(batch, name)[:, window] for name in names})
        one = replace(one, row=["other", *batch.row], segment=one.segment + 1, weight=torch.ones(2))
        alone = objective(one, StudentOutput(logits=z[:, window]), TeacherSignal(logits=y[:, window]))
        torch.testing.assert_close(alone, whole[:, window])
    other = Sampled(samples=5, seed=1)(batch, StudentOutput(logits=z), TeacherSignal(logits=y))
    assert (other != whole).any()


def test_stored_counts_are_the_weights_and_an_empty_entry_weighs_nothing() -> None:
    """ids 2, 2 + one other of five draws, and a place that stands for none."""
    batch, _, z = chunk(1)
    counts = torch.tensor([[[4.0, 1.0, 0.0]]], dtype=torch.float64)
    topk = TopK(ids=torch.tensor([[[2, 5, 0]]]), logprobs=(counts / 5).log(), sampled=True)
    value, gradient = both(Sampled(), batch, z, TeacherSignal(topk=topk))
    log_q = torch.log_softmax(z, -1)[0, 0]
    assert value.item() == pytest.approx(float(-0.8 * log_q[2] - 0.2 * log_q[5]))
    expected = log_q.exp()
    expected[2] -= 0.8
    expected[5] -= 0.2
    torch.testing.assert_close(gradient[0, 0], expected)
    with pytest.raises(ConfigError, match="drawn at 1"):
        Sampled(temperature=2.0)(batch, StudentOutput(logits=z), TeacherSignal(topk=topk))


def test_an_id_that_the_teacher_never_says_is_never_drawn() -> None:
    batch, y, z = chunk()
    y[..., ::2] = -1e4
    _, gradient = both(Sampled(samples=200), batch, z, TeacherSignal(logits=y))
    torch.testing.assert_close(gradient[..., ::2], torch.softmax(z, -1)[..., ::2])


# ---------------------------------------------------------------------------------------------- two tasks


def test_step_by_step_weighs_the_tasks_means() -> None:
    """Four sequences, two of each task: the mean over sequences is alpha of one mean plus 1 - alpha of the other."""
    batch = toy_batch(domains=("label", "rationale"))
    z = torch.randn(*batch.targets.shape, 33, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    objective = StepByStep(alpha=0.2)
    assert objective.reduction == "sequence"
    student = StudentOutput(logits=z)
    value, plain = (o(batch, student, TeacherSignal()) for o in (objective, CrossEntropy()))
    number = batch.targets_by_sequence()
    ours, means = (batch.sum_by_sequence(v) / number for v in (value, plain))
    torch.testing.assert_close(ours.mean(), 0.2 * means[0::2].mean() + 0.8 * means[1::2].mean())


def test_step_by_step_has_its_closed_form_and_formula() -> None:
    batch, y, z = chunk()
    settings: dict[str, Any] = {"alpha": 0.3, "label_smoothing": 0.1}
    value, _ = both(StepByStep(**settings), batch, z, TeacherSignal())
    torch.testing.assert_close(value, by_oracle(oracles.step_by_step, batch, y, z, **settings))
    rationale = StepByStep(**settings, rationale_domains=["x", *batch.domain])
    torch.testing.assert_close(both(rationale, batch, z, TeacherSignal())[0], value * 0.7 / 0.3)


# ---------------------------------------------------------------------------------------------- DIST


def states(batch: Batch, *, same: bool = False, spread: float = 1.0) -> tuple[StudentOutput, TeacherSignal]:
    """Random hidden states and heads of two models in float64, the teacher's with more ids; garbage where masked."""
    generator = torch.Generator().manual_seed(2)

    def model(width: int, size: int) -> dict[str, Any]:
        hidden = spread * torch.randn(*batch.targets.shape, width, generator=generator, dtype=torch.float64)
        hidden[~batch.mask] = math.nan
        weight, bias = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((24, width), (24,)))
        return {"hidden": hidden, "head": Head(weight=weight, bias=bias, vocab_size=size, scale=0.7, softcap=9.0)}

    one = model(4, 20)
    return StudentOutput(**one), TeacherSignal(**(one if same else model(6, 23)))


def plain(record: Any) -> Any:
    head = record.head
    weight, bias = head.weight.detach().numpy(), head.bias.numpy()
    return SimpleNamespace(
        hidden=record.hidden.detach().numpy(),
        head=SimpleNamespace(weight=weight, bias=bias, vocab_size=head.vocab_size, scale=0.7, softcap=9.0),
    )


def arrays(batch: Batch) -> Any:
    return SimpleNamespace(mask=batch.mask.numpy(), segment=batch.segment.numpy(), weight=batch.weight.numpy())


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"beta": 0.0},
        {"gamma": 0.0},
        {"beta": 2.0, "gamma": 0.5, "temperature": 3.0, "temperature_scale": "t2"},
    ],
)
def test_dist_is_its_formula(settings: dict[str, Any]) -> None:
    batch = toy_batch()
    batch.mask[1, 4:] = False  # two targets
    batch.mask[2] = False  # none
    batch.mask[3] = torch.arange(batch.mask.shape[1]) == 5  # one
    student, teacher = states(batch)
    value = DIST(**settings)(batch, student, teacher)
    known = {"beta": 1.0, "gamma": 1.0, "temperature": 1.0, "temperature_scale": "none", **settings}
    expected = oracles_tokens.dist(arrays(batch), plain(student), plain(teacher), **known)
    assert np.isnan(expected).tolist() == [False, False, True, False]
    np.testing.assert_allclose(value.numpy()[[0, 1, 3]], expected[[0, 1, 3]], rtol=1e-11)
    assert value[2] == 0


def test_dists_gradient_is_the_slope_of_its_value_and_ends_at_the_mask() -> None:
    batch = toy_batch()
    student, teacher = states(batch)
    assert student.hidden is not None
    assert student.head is not None
    clean = torch.where(batch.mask.unsqueeze(-1), student.hidden, 0.0)

    def value(hidden: Tensor, weight: Tensor) -> Tensor:
        assert student.head is not None
        moved = StudentOutput(hidden=hidden, head=replace(student.head, weight=weight))
        return DIST(temperature=1.5, beta=0.7)(batch, moved, teacher)

    leaves = (clean.requires_grad_(), student.head.weight.clone().requires_grad_())
    assert torch.autograd.gradcheck(value, leaves)
    d_hidden, d_weight = torch.autograd.grad(value(*leaves).sum(), leaves)
    assert d_hidden[~batch.mask].abs().max() == 0
    assert d_weight[20:].abs().max() == 0


def test_dist_is_zero_with_zero_gradient_for_the_teacher_itself_and_positive_elsewhere() -> None:
    batch = toy_batch()
    student, teacher = states(batch, same=True)
    assert student.hidden is not None
    leaf = student.hidden.clone().requires_grad_()
    value = DIST()(batch, replace(student, hidden=leaf), teacher)
    value.sum().backward()
    assert value.abs().max() < 1e-12
    assert leaf.grad is not None
    assert leaf.grad[batch.mask].abs().max() < 1e-12
    assert DIST()(batch, *states(batch)).min() > 0.1


@pytest.mark.parametrize("size", [1, 2, 5])
def test_dist_does_not_depend_on_the_size_of_chunks(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    batch = toy_batch()
    student, teacher = states(batch)
    results = []
    for chunked in (False, True):
        if chunked:
            monkeypatch.setattr(dist_module, "chunk_size", lambda *_, **__: size)
        assert student.hidden is not None
        leaf = student.hidden.clone().requires_grad_()
        value = DIST()(batch, replace(student, hidden=leaf), teacher)
        value.sum().backward()
        assert leaf.grad is not None
        results.append((value.detach(), leaf.grad[batch.mask]))
    torch.testing.assert_close(results[1], results[0])


def test_dist_forgives_a_student_that_is_only_more_certain() -> None:
    """q in proportion to p squared: far in KL, near in correlation, which is what the paper is after."""
    batch = toy_batch(rows=1)
    student, teacher = states(batch, same=True)
    assert student.head is not None
    assert student.head.bias is not None
    sharper = replace(student.head, weight=2 * student.head.weight, bias=2 * student.head.bias, softcap=None)
    teacher.head = replace(sharper, weight=student.head.weight, bias=student.head.bias)
    assert 0 < DIST(gamma=0.0)(batch, replace(student, head=sharper), teacher).item() < 0.2


def test_ids_of_constant_probability_count_nothing_in_float32() -> None:
    """A student that says the same everywhere has no correlation over the sequence, and no gradient from noise."""
    batch = toy_batch(rows=1)
    student, teacher = states(batch)
    assert student.hidden is not None
    assert student.head is not None
    constant = torch.full_like(student.hidden, 0.5).float().requires_grad_()
    low = replace(student.head, weight=student.head.weight.float(), bias=torch.zeros(24))
    value = DIST(beta=0.0)(batch, StudentOutput(hidden=constant, head=low), teacher)
    value.sum().backward()
    assert value.item() == 0
    assert constant.grad is not None
    assert constant.grad.abs().max() == 0


def test_dist_without_a_target_is_zero_with_a_graph() -> None:
    batch = toy_batch()
    batch.mask.fill_(False)
    student, teacher = states(batch)
    assert student.hidden is not None
    leaf = student.hidden.clone().requires_grad_()
    value = DIST()(batch, replace(student, hidden=leaf), teacher)
    value.sum().backward()
    assert value.tolist() == [0.0] * 4
    assert leaf.grad is not None
    assert leaf.grad.abs().max() == 0


# ---------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (TAID, {"t": 1.1}, r"t is 1.1; set the teacher's share"),
        (HingeRanking, {"margin": -0.1}, "lead of at least 0"),
        (HingeRanking, {"top_k": 1}, "at least 2 ids"),
        (Sampled, {"samples": 0}, "at least one draw"),
        (Sampled, {"tau": 0.0}, "exponent above 0"),
        (StepByStep, {"alpha": 1.5}, "labels' share"),
        (StepByStep, {"rationale_domains": []}, "name the domains"),
        (DIST, {"gamma": -1.0}, "at least 0"),
        (DIST, {"temperature": 0.0}, "temperature is"),
    ],
)
def test_settings_outside_the_formula_are_refused(kind: type[Objective], settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        kind(**settings)


@pytest.mark.parametrize("kind", [ForwardKL, DIST, LogisticRanking])
def test_unequal_vocabularies_are_refused_where_that_is_asked_for(kind: Callable[..., Objective]) -> None:
    small, large = (SimpleNamespace(get_vocab=lambda n=n: {str(i): i for i in range(n)}) for n in (10, 12))
    for objective in (kind(vocabulary="shared"), kind(vocabulary="error")):
        objective.match(small, small)
    kind(vocabulary="shared").match(small, large)
    with pytest.raises(ConfigError, match="student has 10 ids but the teacher 12; set vocabulary=shared"):
        kind(vocabulary="error").match(small, large)


def test_saturated_logits_stay_finite() -> None:
    batch, y, z = chunk()
    objectives = (TAID(), HingeRanking(), LogisticRanking(), Sampled(), StepByStep())
    for objective, size in itertools.product(objectives, (30.0, 3000.0)):
        low, exact = (
            objective.closed_form(
                batch, StudentOutput(logits=(size * z).to(dtype)), TeacherSignal(logits=(size * y).to(dtype))
            )
            for dtype in (torch.float32, torch.float64)
        )
        assert low is not None
        assert exact is not None
        for one, other in zip(low, exact, strict=True):
            torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)
