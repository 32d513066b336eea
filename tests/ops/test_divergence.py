"""Divergences: properties, and values worked out independently in float64 numpy."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from kdcli.ops import divergence as d

VALUES = {
    "forward_kl": (d.forward_kl, d.forward_kl_gradient),
    "reverse_kl": (d.reverse_kl, d.reverse_kl_gradient),
    **{
        f"generalized_jsd_{beta}": (
            partial(d.generalized_jsd, beta=beta),
            partial(d.generalized_jsd_gradient, beta=beta),
        )
        for beta in (0.1, 0.5, 0.9)
    },
}
every_divergence = pytest.mark.parametrize("name", VALUES)


def oracle(name: str, log_p: Tensor, log_q: Tensor) -> np.ndarray:
    """The textbook formulas on probabilities, in numpy float64."""
    p, q = np.exp(log_p.double().numpy()), np.exp(log_q.double().numpy())

    def kl(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.sum(a * (np.log(a) - np.log(b)), axis=-1)

    if name == "forward_kl":
        return kl(p, q)
    if name == "reverse_kl":
        return kl(q, p)
    beta = float(name.rsplit("_", 1)[1])
    m = beta * p + (1 - beta) * q
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def pair(rows: int = 6, size: int = 11, dtype: torch.dtype = torch.float64, spread: float = 2.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    y, z = (spread * torch.randn(rows, size, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    return torch.log_softmax(y, -1), torch.log_softmax(z, -1)


@every_divergence
def test_value_is_the_textbook_formula(name: str) -> None:
    log_p, log_q = pair()
    np.testing.assert_allclose(VALUES[name][0](log_p, log_q).numpy(), oracle(name, log_p, log_q), rtol=1e-12)


@every_divergence
def test_zero_with_zero_gradient_at_p_equals_q(name: str) -> None:
    log_p, _ = pair()
    value, gradient = VALUES[name][1](log_p, log_p.clone())
    assert value.abs().max() < 1e-14 and gradient.abs().max() < 1e-14


@every_divergence
def test_positive_when_p_differs_from_q(name: str) -> None:
    assert (VALUES[name][0](*pair()) > 0).all()


@every_divergence
def test_closed_form_equals_autograd_and_finite_differences(name: str) -> None:
    function, closed = VALUES[name]
    log_p, log_q = pair()
    z = log_q.clone().requires_grad_()
    value = function(log_p, torch.log_softmax(z, -1))
    (by_autograd,) = torch.autograd.grad(value.sum(), z)
    value_closed, by_hand = closed(log_p, log_q.clone())
    torch.testing.assert_close(value_closed, value, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(by_hand, by_autograd, rtol=1e-10, atol=1e-13)
    assert torch.autograd.gradcheck(lambda z: function(log_p, torch.log_softmax(z, -1)), (z,))


@every_divergence
def test_vocabulary_order_does_not_matter(name: str) -> None:
    log_p, log_q = pair()
    order = torch.randperm(log_p.shape[-1], generator=torch.Generator().manual_seed(2))
    function = VALUES[name][0]
    torch.testing.assert_close(function(log_p[:, order], log_q[:, order]), function(log_p, log_q))


@every_divergence
def test_finite_on_saturated_float32_logits(name: str) -> None:
    """Probabilities far below float32's smallest number: log-space forms stay finite, and right to 1e-5."""
    y = torch.tensor([[200.0, 0.0, -200.0], [-150.0, 150.0, 0.0]])
    z = torch.tensor([[-200.0, 0.0, 200.0], [150.0, -150.0, 0.0]])
    log_p, log_q = torch.log_softmax(y, -1), torch.log_softmax(z, -1)
    value, gradient = VALUES[name][1](log_p, log_q.clone())
    reference = VALUES[name][0](torch.log_softmax(y.double(), -1), torch.log_softmax(z.double(), -1))
    assert torch.isfinite(value).all() and torch.isfinite(gradient).all()
    torch.testing.assert_close(value.double(), reference, rtol=1e-5, atol=1e-6)


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
