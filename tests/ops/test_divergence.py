"""Divergences: properties, and values worked out independently in float64 numpy."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from kdcli.ops import divergence as d
from kdcli.train.conformance import oracles

# at the inside, at the ends and on the lines where a formula has a limit
AB = [(0.5, 0.5), (0.2, 0.7), (1.0, 0.0), (0.0, 1.0), (0.4, 0.0), (0.0, 0.6), (0.0, 0.0), (2.0, 1.0)]
AB += [(0.6, -0.6), (-0.3, 0.8), (1.3, -0.4)]  # the last three overflow where supports differ
SETTINGS = {
    "forward_kl": [{}],
    "reverse_kl": [{}],
    "symmetric_kl": [{"forward_weight": w} for w in (0.0, 0.3, 1.0)],
    "adaptive_kl": [{"mu": mu} for mu in (0.1, 0.5, 0.9)],
    "generalized_jsd": [{"beta": beta} for beta in (0.1, 0.5, 0.9)],
    "skew_kl": [{"alpha": alpha} for alpha in (0.0, 0.1, 0.9)],
    "skew_reverse_kl": [{"alpha": alpha} for alpha in (0.0, 0.1, 0.9)],
    "total_variation": [{}],
    "alpha_beta": [{"alpha": a, "beta": b} for a, b in AB],
    "logit_mse": [{}],
}
CASES = [(name, settings) for name, several in SETTINGS.items() for settings in several]
every_divergence = pytest.mark.parametrize(
    ("name", "settings"), CASES, ids=["-".join([n, *(f"{v:g}" for v in s.values())]) for n, s in CASES]
)
HOLDS = {"adaptive_kl"}  # their gradient is not that of the value: a weight is held fixed


def functions(name: str, settings: dict[str, float]):
    """(value, value and gradient) of log_p and log_q."""
    return partial(getattr(d, name), **settings), partial(getattr(d, f"{name}_gradient"), **settings)


def oracle(name: str, settings: dict[str, float], log_p: Tensor, log_q: Tensor) -> np.ndarray:
    """The textbook formulas in numpy float64, one row after another."""
    rows = zip(log_p.double().numpy(), log_q.double().numpy(), strict=True)
    return np.array([getattr(oracles, name)(u, v, 0, **settings) for u, v in rows])


def pair(
    rows: int = 6, size: int = 11, dtype: torch.dtype = torch.float64, spread: float = 2.0
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    y, z = (spread * torch.randn(rows, size, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    return torch.log_softmax(y, -1), torch.log_softmax(z, -1)


@every_divergence
def test_value_is_the_textbook_formula(name: str, settings: dict[str, float]) -> None:
    log_p, log_q = pair()
    value, _ = functions(name, settings)
    np.testing.assert_allclose(value(log_p, log_q).numpy(), oracle(name, settings, log_p, log_q), rtol=1e-11)


@every_divergence
def test_zero_with_zero_gradient_at_p_equals_q(name: str, settings: dict[str, float]) -> None:
    log_p, _ = pair()
    value, gradient = functions(name, settings)[1](log_p, log_p.clone())
    assert value.abs().max() < 1e-14
    assert gradient.abs().max() < 1e-14


@every_divergence
def test_positive_when_p_differs_from_q(name: str, settings: dict[str, float]) -> None:
    assert (functions(name, settings)[0](*pair()) > 0).all()


@every_divergence
def test_closed_form_equals_autograd_and_finite_differences(name: str, settings: dict[str, float]) -> None:
    value, closed = functions(name, settings)
    log_p, log_q = pair()
    z = log_q.clone().requires_grad_()
    values = value(log_p, torch.log_softmax(z, -1))
    (by_autograd,) = torch.autograd.grad(values.sum(), z)
    value_closed, by_hand = closed(log_p, log_q.clone())
    torch.testing.assert_close(value_closed, values, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(by_hand, by_autograd, rtol=1e-10, atol=1e-13)
    if name not in HOLDS:
        assert torch.autograd.gradcheck(lambda z: value(log_p, torch.log_softmax(z, -1)), (z,))


@every_divergence
def test_closed_form_leaves_its_arguments_alone(name: str, settings: dict[str, float]) -> None:
    log_p, log_q = pair()
    copies = log_p.clone(), log_q.clone()
    functions(name, settings)[1](log_p, log_q)
    assert torch.equal(log_p, copies[0])
    assert torch.equal(log_q, copies[1])


@every_divergence
def test_vocabulary_order_does_not_matter(name: str, settings: dict[str, float]) -> None:
    log_p, log_q = pair()
    order = torch.randperm(log_p.shape[-1], generator=torch.Generator().manual_seed(2))
    value, _ = functions(name, settings)
    torch.testing.assert_close(value(log_p[:, order], log_q[:, order]), value(log_p, log_q))


@every_divergence
def test_finite_on_saturated_float32_logits(name: str, settings: dict[str, float]) -> None:
    """Probabilities far below float32's smallest number: log-space forms stay finite, and right to 1e-5."""
    if min(settings.values(), default=0) < 0:
        pytest.skip("unbounded by its formula where the supports differ")
    y = torch.tensor([[200.0, 0.0, -200.0], [-150.0, 150.0, 0.0]])
    z = torch.tensor([[-200.0, 0.0, 200.0], [150.0, -150.0, 0.0]])
    log_p, log_q = torch.log_softmax(y, -1), torch.log_softmax(z, -1)
    value, gradient = functions(name, settings)[1](log_p, log_q.clone())
    exact, slope = functions(name, settings)[1](torch.log_softmax(y.double(), -1), torch.log_softmax(z.double(), -1))
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.double(), slope, rtol=1e-5, atol=1e-6)


def test_special_cases_of_the_alpha_beta_divergence() -> None:
    """(1, 0) and (0, 1) are the KLs, (1/2, 1/2) is 2 sum (sqrt p - sqrt q)^2."""
    log_p, log_q = pair()
    torch.testing.assert_close(d.alpha_beta(log_p, log_q, 1.0, 0.0), d.forward_kl(log_p, log_q))
    torch.testing.assert_close(d.alpha_beta(log_p, log_q, 0.0, 1.0), d.reverse_kl(log_p, log_q))
    roots = ((log_p / 2).exp() - (log_q / 2).exp()).square().sum(-1)
    torch.testing.assert_close(d.alpha_beta(log_p, log_q, 0.5, 0.5), 2 * roots)
    torch.testing.assert_close(d.alpha_beta(log_p, log_q, 0.3, 0.8), d.alpha_beta(log_q, log_p, 0.8, 0.3))


@pytest.mark.parametrize("limit", [(0.7, 0.0), (0.0, 0.7), (0.5, -0.5), (0.0, 0.0), (1.0, 0.0), (0.0, 1.0)])
def test_the_alpha_beta_divergence_is_continuous_at_its_limits(limit: tuple[float, float]) -> None:
    """Value and gradient near a limit differ from it in proportion (METHODS D10: a wrong factor jumps)."""
    log_p, log_q = pair(spread=1.0)
    at = d.alpha_beta_gradient(log_p, log_q, *limit)
    for step, direction in ((s, k) for s in (1e-4, 1e-6) for k in ((1, 0), (0, 1), (-1, 1), (1, 1), (0, -1))):
        near = d.alpha_beta_gradient(log_p, log_q, limit[0] + step * direction[0], limit[1] + step * direction[1])
        for one, other in zip(near, at, strict=True):
            torch.testing.assert_close(one, other, rtol=100 * step, atol=100 * step)


@pytest.mark.parametrize("tiny", [1e-2, 1e-3, 1e-4, 1e-5, 1e-8])
def test_the_alpha_beta_divergence_near_its_limits_is_right_in_float32(tiny: float) -> None:
    """Where the formula divides a difference of equals by a small number."""
    log_p, log_q = pair(spread=4.0, size=101)
    for settings in (
        (tiny, 0.0),
        (0.0, tiny),
        (tiny, tiny),
        (0.7, tiny),
        (tiny, 0.7),
        (0.7, -tiny),
        (0.5 + tiny, -0.5),
    ):
        value = d.alpha_beta(log_p.float(), log_q.float(), *settings)
        torch.testing.assert_close(value.double(), d.alpha_beta(log_p, log_q, *settings), rtol=1e-3, atol=1e-4)


def test_adaptive_weight_worked_out_by_hand() -> None:
    """p = (.5, .3, .2), q = (.2, .2, .6), mu = .8: head = {0, 1} with gap .4, tail = {2} with gap .4, so w = 1/2;
    with mu = .5 the head is {0}, gap .3 of .8; with mu = .1 it still has the first id."""
    log_p, log_q = torch.tensor([0.5, 0.3, 0.2]).log(), torch.tensor([0.2, 0.2, 0.6]).log()
    forward, reverse = d.forward_kl(log_p, log_q), d.reverse_kl(log_p, log_q)
    for mu, weight in ((0.81, 0.5), (0.51, 0.375), (0.1, 0.375)):
        expected = weight * forward + (1 - weight) * reverse
        torch.testing.assert_close(d.adaptive_kl(log_p, log_q, mu), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mu", [0.05, 0.5, 0.999])
def test_adaptive_head_is_found_without_sorting_the_vocabulary(mu: float) -> None:
    """Heads of one id, of some, and of more than the 128 and 1,024 ids that are looked at first."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 3000, generator=generator, dtype=torch.float64) * torch.tensor([[0.1], [1.0], [9.0]])
    log_p, log_q = torch.log_softmax(logits, -1)
    expected = oracle("adaptive_kl", {"mu": mu}, log_p, log_q)
    np.testing.assert_allclose(d.adaptive_kl(log_p, log_q, mu).numpy(), expected, rtol=1e-11)


def test_adaptive_gradient_holds_the_weight_fixed() -> None:
    log_p, log_q = pair()
    weight = (d.adaptive_kl(log_p, log_q) - d.reverse_kl(log_p, log_q)) / (
        d.forward_kl(log_p, log_q) - d.reverse_kl(log_p, log_q)
    )
    expected = weight.unsqueeze(-1) * d.forward_kl_gradient(log_p, log_q)[1]
    expected += (1 - weight.unsqueeze(-1)) * d.reverse_kl_gradient(log_p, log_q)[1]
    torch.testing.assert_close(d.adaptive_kl_gradient(log_p, log_q)[1], expected)


def test_detached_mixture_changes_the_gradient_and_not_the_value() -> None:
    """The gradient is that of KL(q || m) for a fixed m, by autograd with m computed beforehand."""
    log_p, log_q = pair()
    free, held = (d.skew_reverse_kl_gradient(log_p, log_q, 0.3, detach) for detach in (False, True))
    torch.testing.assert_close(held[0], free[0])
    z = log_q.clone().requires_grad_()
    mixture = (0.7 * log_p.exp() + 0.3 * log_q.exp()).log()
    (expected,) = torch.autograd.grad(d.forward_kl(torch.log_softmax(z, -1), mixture).sum(), z)
    torch.testing.assert_close(held[1], expected)
    assert (free[1] - expected).abs().max() > 1e-3


@pytest.mark.parametrize("alpha", [0.01, 0.1, 0.5])
def test_skew_divergences_are_bounded(alpha: float) -> None:
    """KL(a || alpha a + ...) <= -log alpha, and reaches it for disjoint supports."""
    apart = torch.tensor([[0.0, -80.0]]), torch.tensor([[-80.0, 0.0]])
    for function in (d.skew_kl, d.skew_reverse_kl):
        assert (function(*pair(spread=9.0), alpha) <= -np.log(alpha)).all()
        assert function(*apart, alpha).item() == pytest.approx(-np.log(alpha), rel=1e-5)


def test_total_variation_is_one_for_disjoint_supports_and_its_slope_at_equality_is_zero() -> None:
    value, gradient = d.total_variation_gradient(torch.tensor([0.0, -80.0]), torch.tensor([-80.0, 0.0]))
    assert value.item() == pytest.approx(1.0)
    assert gradient.abs().max() < 1e-6
    log_p, _ = pair()
    assert torch.equal(d.total_variation_gradient(log_p, log_p)[1], torch.zeros_like(log_p))


def targets_of(log_p: Tensor) -> Tensor:
    return torch.arange(log_p.shape[0]) % log_p.shape[-1]


@pytest.mark.parametrize(("a", "b"), [(1.0, 8.0), (0.0, 1.0), (2.0, 0.0), (0.7, 0.3)])
def test_decoupled_kl_is_the_textbook_formula_and_its_gradient_autograds(a: float, b: float) -> None:
    log_p, log_q = pair()
    targets = targets_of(log_p)
    expected = [oracles.dkd(y, z, int(t), a, b) for y, z, t in zip(log_p.numpy(), log_q.numpy(), targets, strict=True)]
    z = log_q.clone().requires_grad_()
    value = d.decoupled_kl(log_p, torch.log_softmax(z, -1), targets, a, b)
    (slope,) = torch.autograd.grad(value.sum(), z)
    by_hand = d.decoupled_kl_gradient(log_p, log_q, targets, a, b)
    np.testing.assert_allclose(value.detach().numpy(), expected, rtol=1e-11)
    torch.testing.assert_close(by_hand[0], value)
    torch.testing.assert_close(by_hand[1], slope)


def test_decoupled_kl_adds_up_to_the_kl() -> None:
    """KL(p || q) = KL of (target, not target) + (1 - p_target) KL among the others (DKD, eq. 6)."""
    log_p, log_q = pair()
    targets = targets_of(log_p)
    rest = 1 - log_p.exp().gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    total = d.decoupled_kl(log_p, log_q, targets, 1.0, 0.0) + rest * d.decoupled_kl(log_p, log_q, targets, 0.0, 1.0)
    torch.testing.assert_close(total, d.forward_kl(log_p, log_q))


@pytest.mark.parametrize("sure", [30.0, 200.0, 3000.0])
def test_decoupled_kl_keeps_the_other_ids_where_the_target_is_certain(sure: float) -> None:
    """p_target rounds to 1 in float32 and a logit of 3000 outdoes a mask of 1000: the other ids still differ by the
    same KL, here 1/2 ln 4/3 between (1/2, 1/2) and (3/4, 1/4)."""
    others = torch.tensor([[0.5, 0.5], [0.75, 0.25]]).log()
    logits = torch.cat([torch.full((2, 1), sure), others], dim=-1)
    log_p, log_q = torch.log_softmax(logits, -1)
    value, gradient = d.decoupled_kl_gradient(log_p[None], log_q[None], torch.tensor([0]), 0.0, 1.0)
    assert value.item() == pytest.approx(0.5 * np.log(4 / 3), rel=2e-3)
    assert gradient[0].tolist() == pytest.approx([0.0, 0.25, -0.25], abs=2e-4)


def test_forward_and_reverse_are_not_swapped() -> None:
    """p = (1/2, 1/2), q = (3/4, 1/4): KL(p||q) = ln(2/sqrt 3), KL(q||p) = 3/4 ln 3/2 + 1/4 ln 1/2."""
    log_p, log_q = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.75, 0.25]).log()
    assert d.forward_kl(log_p, log_q).item() == pytest.approx(np.log(2 / np.sqrt(3)), rel=1e-5)
    assert d.reverse_kl(log_p, log_q).item() == pytest.approx(0.75 * np.log(1.5) + 0.25 * np.log(0.5), rel=1e-5)


def test_beta_of_the_jsd_weights_the_teacher() -> None:
    """With disjoint supports JSD = beta ln(1/beta) + (1 - beta) ln(1/(1 - beta)); the mixture's share tells who."""
    log_p, log_q = pair(1, 5)
    m = 0.9 * log_p.exp() + 0.1 * log_q.exp()
    expected = 0.9 * d.forward_kl(log_p, m.log()) + 0.1 * d.forward_kl(log_q, m.log())
    torch.testing.assert_close(d.generalized_jsd(log_p, log_q, 0.9), expected)
    apart = d.generalized_jsd(torch.tensor([0.0, -80.0]), torch.tensor([-80.0, 0.0]), 0.9).item()
    assert apart == pytest.approx(-0.9 * np.log(0.9) - 0.1 * np.log(0.1), rel=1e-5)


def test_normalised_jsd_tends_to_the_two_kls() -> None:
    """JSD / (beta (1 - beta)) -> KL(p || q) as beta -> 0 and KL(q || p) as beta -> 1 (METHODS D2)."""
    log_p, log_q = pair(3, 7, spread=0.7)
    for beta, limit in ((1e-5, d.forward_kl), (1 - 1e-5, d.reverse_kl)):
        scaled = d.generalized_jsd(log_p, log_q, beta) / (beta * (1 - beta))
        torch.testing.assert_close(scaled, limit(log_p, log_q), rtol=1e-3, atol=1e-5)


def test_entropy_of_a_uniform_distribution_is_log_of_its_size() -> None:
    assert d.entropy(torch.full((8,), 1 / 8).log()).item() == pytest.approx(np.log(8))
