"""What is particular to one objective."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from kdcli.api import Objective, StudentOutput, TeacherSignal, TopK
from kdcli.errors import ConfigError
from kdcli.objective._divergence import Divergence
from kdcli.objective.adaptive_kl import AdaptiveKL
from kdcli.objective.alpha_beta import AlphaBeta
from kdcli.objective.cross_entropy import CrossEntropy
from kdcli.objective.dkd import DKD
from kdcli.objective.forward_kl import ForwardKL
from kdcli.objective.generalized_jsd import GeneralizedJSD
from kdcli.objective.hinge_ranking import HingeRanking
from kdcli.objective.hinton import Hinton
from kdcli.objective.logistic_ranking import LogisticRanking
from kdcli.objective.logit_mse import LogitMSE
from kdcli.objective.reverse_kl import ReverseKL
from kdcli.objective.sampled import Sampled
from kdcli.objective.skew_kl import SkewKL
from kdcli.objective.skew_reverse_kl import SkewReverseKL
from kdcli.objective.symmetric_kl import SymmetricKL
from kdcli.objective.total_variation import TotalVariation
from tests.objective.chunks import V, chunk, stored


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
def test_cross_entropy_is_torchs(smoothing: float) -> None:
    batch, _, z = chunk()
    ours = CrossEntropy(label_smoothing=smoothing)(batch, StudentOutput(logits=z), TeacherSignal())
    reference = torch.nn.functional.cross_entropy(z[0], batch.targets[0], label_smoothing=smoothing, reduction="none")
    torch.testing.assert_close(ours[0], reference)


def test_forward_kl_minus_cross_entropy_is_minus_the_teachers_entropy() -> None:
    """A one-hot teacher has no entropy: KL(onehot || q) is the cross-entropy with its token (METHODS D3)."""
    batch, _, z = chunk()
    y = torch.full((1, batch.targets.shape[1], V), -40.0, dtype=torch.float64)
    y.scatter_(-1, batch.targets.unsqueeze(-1), 40.0)
    kl = ForwardKL()(batch, StudentOutput(logits=z), TeacherSignal(logits=y))
    torch.testing.assert_close(kl, CrossEntropy()(batch, StudentOutput(logits=z), TeacherSignal()))


@pytest.mark.parametrize("beta", [0.0, 1.0, -0.1, 2.0])
def test_the_ends_of_beta_are_refused_and_the_way_out_named(beta: float) -> None:
    with pytest.raises(ConfigError, match="forward_kl or reverse_kl"):
        GeneralizedJSD(beta=beta)


@pytest.mark.parametrize("smoothing", [-0.1, 1.0])
def test_label_smoothing_is_a_share(smoothing: float) -> None:
    with pytest.raises(ConfigError, match="label_smoothing"):
        CrossEntropy(label_smoothing=smoothing)


def test_log_probabilities_of_another_temperature_are_refused() -> None:
    batch, y, z = chunk()
    logprobs, ids = torch.log_softmax(y, -1).topk(4)
    with pytest.raises(ConfigError, match=r"stored at 1\.0"):
        ForwardKL(temperature=2.0)(batch, StudentOutput(logits=z), TeacherSignal(topk=TopK(ids=ids, logprobs=logprobs)))


def test_likeliest_ids_and_drawn_ids_are_not_taken_for_each_other() -> None:
    batch, y, z = chunk()
    logprobs, ids = torch.log_softmax(y, -1).topk(4)
    likeliest, drawn = (TeacherSignal(topk=TopK(ids=ids, logprobs=logprobs, sampled=is_)) for is_ in (False, True))
    for objective in (ForwardKL(), ReverseKL(), HingeRanking()):
        with pytest.raises(ConfigError, match="set objective=sampled, or store the likeliest ids"):
            objective.closed_form(batch, StudentOutput(logits=z), drawn)
        objective(batch, StudentOutput(logits=z), likeliest)
    with pytest.raises(ConfigError, match="set objective=forward_kl, or draw ids"):
        Sampled()(batch, StudentOutput(logits=z), likeliest)


def test_a_ranking_leaves_out_entries_that_stand_for_none() -> None:
    batch, y, z = chunk()
    logprobs, ids = torch.log_softmax(y, -1).topk(4)
    nothing = torch.full_like(logprobs, -float("inf"))
    wider = TopK(ids=torch.cat([torch.zeros_like(ids), ids], -1), logprobs=torch.cat([nothing, logprobs], -1))
    for objective in (HingeRanking(), LogisticRanking()):
        plain = TopK(ids=ids, logprobs=logprobs)
        one, other = (
            objective.closed_form(batch, StudentOutput(logits=z), TeacherSignal(topk=t)) for t in (plain, wider)
        )
        torch.testing.assert_close(other, one)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (SymmetricKL, {"forward_weight": 1.1}, "forward_weight is 1.1; set a share"),
        (SkewKL, {"alpha": 1.0}, "teacher's share"),
        (SkewReverseKL, {"alpha": -0.1}, "student's share"),
        (AdaptiveKL, {"mu": 1.0}, "head's probability"),
        (AlphaBeta, {"alpha": float("nan")}, "finite numbers"),
        (DKD, {"beta": -1.0}, "at least 0"),
    ],
)
def test_settings_outside_the_formula_are_refused(kind: type[Objective], settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        kind(**settings)


@pytest.mark.parametrize("objective", [LogitMSE(), DKD(temperature=1.0)])
def test_what_needs_the_whole_vocabulary_refuses_a_top_k_teacher(objective: Objective) -> None:
    batch, y, z = chunk()
    logprobs, ids = torch.log_softmax(y, -1).topk(4)
    with pytest.raises(ConfigError, match="whole vocabulary"):
        objective(batch, StudentOutput(logits=z), TeacherSignal(topk=TopK(ids=ids, logprobs=logprobs)))


def test_hinton_is_sixteen_times_the_forward_kl_at_temperature_four() -> None:
    batch, y, z = chunk()
    plain = ForwardKL(temperature=4.0)(batch, StudentOutput(logits=z), TeacherSignal(logits=y))
    torch.testing.assert_close(Hinton()(batch, StudentOutput(logits=z), TeacherSignal(logits=y)), 16 * plain)


def test_t2_makes_the_temperature_cancel_in_the_logit_mse() -> None:
    batch, y, z = chunk()
    one, other = (LogitMSE(temperature=t, temperature_scale="t2") for t in (1.0, 7.0))
    values = [o(batch, StudentOutput(logits=z), TeacherSignal(logits=y)) for o in (one, other)]
    torch.testing.assert_close(*values)
    centred = (z - z.mean(-1, keepdim=True)) - (y - y.mean(-1, keepdim=True))
    torch.testing.assert_close(values[0], centred.square().mean(-1))


class Derived(ForwardKL):
    """A divergence without a closed form of its own."""

    def divergence_gradient(self, log_p: Tensor, log_q: Tensor) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None


SPARSE = [
    ForwardKL,
    ReverseKL,
    SymmetricKL,
    AdaptiveKL,
    GeneralizedJSD,
    SkewKL,
    SkewReverseKL,
    partial(SkewReverseKL, detach_mixture=True),
    TotalVariation,
    AlphaBeta,
    partial(AlphaBeta, alpha=0.0, beta=1.0),
    Hinton,
    Derived,
]


@pytest.mark.parametrize("missing", ["tail", "renormalize", "teacher_only"])
@pytest.mark.parametrize("kind", SPARSE, ids=lambda kind: getattr(kind, "__name__", str(kind)))
def test_the_closed_form_of_a_top_k_teacher_is_autograds(kind: Callable[..., Divergence], missing: str) -> None:
    batch, y, z = chunk()
    for k, temperature in itertools.product((1, 2, 6, V - 1, V), (1.0, 3.0)):
        objective, teacher = (
            kind(missing=missing, temperature=temperature, temperature_scale="t2"),
            stored(y, k, temperature),
        )
        leaf = z.clone().requires_grad_()
        value = objective(batch, StudentOutput(logits=leaf), teacher)
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
        closed = objective.closed_form(batch, StudentOutput(logits=z), teacher)
        assert closed is not None
        torch.testing.assert_close(closed[0], value.detach(), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(closed[1], gradient, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("missing", ["tail", "renormalize", "teacher_only"])
@pytest.mark.parametrize("kind", SPARSE, ids=lambda kind: getattr(kind, "__name__", str(kind)))
def test_a_saturated_student_of_a_top_k_teacher_is_finite(kind: Callable[..., Divergence], missing: str) -> None:
    """Logits of hundreds in float32: the mass of the rest, and of the kept ids, underflows on either side."""
    batch, y, z = chunk()
    for k, size in itertools.product((1, 4, V - 1), (30.0, 300.0, 3000.0)):
        objective, low = kind(missing=missing, temperature=1.0), (size * z).float()
        teacher, exact = stored((size * y).float(), k, 1.0), stored((size * y).float(), k, 1.0)
        by_hand = objective.closed_form(batch, StudentOutput(logits=low), teacher)
        double = objective.closed_form(batch, StudentOutput(logits=low.double()), exact)
        assert by_hand is not None
        assert double is not None
        largest = double[0].abs().max().clamp(min=1.0)
        torch.testing.assert_close(by_hand[0].double() / largest, double[0] / largest, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(by_hand[1].double() / largest, double[1] / largest, rtol=1e-5, atol=1e-5)


def test_missing_mass_worked_out_by_hand() -> None:
    """p = (1/2, 1/4, ...) on two ids of q = (1/4, 1/4, 1/4, 1/4), so a rest of 1/4 and 1/2.

    tail: 1/2 ln 2 + 1/4 ln 1 + 1/4 ln 1/2 = 1/4 ln 2. renormalize: (2/3, 1/3) and (1/2, 1/2): ln 2 - H(1/3).
    teacher_only: (2/3, 1/3, 0) and (1/4, 1/4, 1/2): 2/3 ln 8/3 + 1/3 ln 4/3.
    """
    batch, _, _ = chunk(1)
    topk = TopK(ids=torch.tensor([[[2, 0]]]), logprobs=torch.tensor([[[0.5, 0.25]]]).double().log())
    entropy = math.log(3) - 2 / 3 * math.log(2)
    expected = {
        "tail": math.log(2) / 4,
        "renormalize": math.log(2) - entropy,
        "teacher_only": 2 / 3 * math.log(8 / 3) + math.log(4 / 3) / 3,
    }
    for missing, value in expected.items():
        student = StudentOutput(logits=torch.zeros(1, 1, 4, dtype=torch.float64))
        objective = ForwardKL(missing=missing)  # pyright: ignore[reportArgumentType]
        assert objective(batch, student, TeacherSignal(topk=topk)).item() == pytest.approx(value)


def test_the_gradient_of_a_tail_is_spread_over_the_rest_by_the_students_own_shares() -> None:
    """q_i - p_i at the K ids, q_i (1 - p_rest / q_rest) at the others."""
    batch, y, z = chunk()
    teacher = stored(y, 4, 1.0)
    closed = ForwardKL().closed_form(batch, StudentOutput(logits=z), teacher)
    assert closed is not None
    assert teacher.topk is not None
    ids, p, q = teacher.topk.ids, teacher.topk.logprobs.exp(), torch.softmax(z, -1)
    p_rest, q_rest = 1 - p.sum(-1, keepdim=True), 1 - q.gather(-1, ids).sum(-1, keepdim=True)
    expected = (q * (1 - p_rest / q_rest)).scatter(-1, ids, q.gather(-1, ids) - p)
    torch.testing.assert_close(closed[1], expected)


def test_t_squared_is_read_when_it_is_used() -> None:
    """A schedule may change the temperature between steps."""
    batch, y, z = chunk()
    moved, made = Hinton(), Hinton(temperature=2.0)
    moved.temperature = 2.0
    pair = [o(batch, StudentOutput(logits=z), TeacherSignal(logits=y)) for o in (moved, made)]
    torch.testing.assert_close(*pair)
