"""The common support: sums to one, bounds the dense divergence, tightens with K."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kdcli.ops import divergence as d
from kdcli.ops.support import Missing, log_rest, on_support, sparse, student_side, teacher_side

MISSING: tuple[Missing, ...] = ("tail", "renormalize", "teacher_only")


@pytest.fixture
def pair() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    y, z = (2 * torch.randn(4, 50, generator=generator, dtype=torch.float64) for _ in range(2))
    return torch.log_softmax(y, -1), torch.log_softmax(z, -1)


@pytest.mark.parametrize("k", [1, 5, 50])
@pytest.mark.parametrize("missing", MISSING)
def test_both_sides_sum_to_one(pair: tuple[Tensor, Tensor], missing: Missing, k: int) -> None:
    log_p, log_q = pair
    logprobs, ids = log_p.topk(k)
    for side in sparse(ids, logprobs, log_q, missing):
        torch.testing.assert_close(side.exp().sum(-1), torch.ones(4, dtype=torch.float64))


def test_log_probabilities_rounded_when_stored_still_sum_to_one() -> None:
    """float16 keeps three digits: four ids that hold everything may sum to more than 1."""
    stored = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log().half() + 0.001
    assert stored.float().exp().sum() > 1
    side = teacher_side(stored, torch.zeros(1, 9))
    torch.testing.assert_close(side.exp().sum(-1), torch.ones(1))
    assert torch.isfinite(side).all()


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("k", [1, 5, 49, 50])
@pytest.mark.parametrize("missing", MISSING)
def test_the_students_side_and_its_way_back_are_autograds(
    pair: tuple[Tensor, Tensor], missing: Missing, k: int, temperature: float
) -> None:
    """A fixed slope at every symbol: the gradient on S, taken back to the vocabulary, is what autograd finds there."""
    log_p, z = pair
    logprobs, ids = log_p.topk(k)
    ids = ids.flip(-1)
    leaf = (z / temperature).requires_grad_()
    _, expected = sparse(ids, logprobs, torch.log_softmax(leaf, -1), missing)
    slope = torch.linspace(-1, 2, expected.shape[-1], dtype=torch.float64)
    (derived,) = torch.autograd.grad((expected * slope).sum(), leaf)
    log_q, back = student_side(z, ids, temperature, missing)
    torch.testing.assert_close(log_q, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(back(slope - log_q.exp() * slope.sum()), derived, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("left", [1e-3, 1e-7, 1e-20, 1e-37])
def test_the_students_rest_is_right_where_the_kept_ids_hold_nearly_everything(left: float) -> None:
    """1 - sum of the kept would be lost in float32 below 1e-7."""
    logits = torch.tensor([[0.0, 0.0, math.log(left), math.log(left)]])
    ids = torch.tensor([[0, 1]])
    for log_q in (
        student_side(logits, ids)[0],
        sparse(ids, torch.tensor([[0.5, 0.4]]).log(), logits.log_softmax(-1))[1],
    ):
        assert log_q[0, 2].item() == pytest.approx(math.log(left) - math.log1p(left), rel=1e-5)
    gradient = student_side(logits, ids)[1](torch.tensor([[0.25, 0.25, -0.5]]))
    assert gradient[0].tolist() == pytest.approx([0.25, 0.25, -0.25, -0.25])


@pytest.mark.parametrize("divergence", [d.forward_kl, d.reverse_kl, d.generalized_jsd])
def test_tail_bucket_bounds_the_dense_value_from_below_and_tightens_with_k(
    pair: tuple[Tensor, Tensor], divergence
) -> None:
    """Merging symbols never raises an f-divergence (data processing), and finer partitions lower it less."""
    log_p, log_q = pair
    dense = divergence(*on_support(log_q, log_p=log_p))
    last = torch.full_like(dense, -1e-9)
    for k in (1, 2, 4, 8, 16, 32, 49):
        logprobs, ids = log_p.topk(k)
        value = divergence(*on_support(log_q, ids=ids, logprobs=logprobs))
        assert (value >= last - 1e-9).all() and (value <= dense + 1e-9).all(), k
        last = value
    torch.testing.assert_close(last, dense)  # 49 ids and one "rest" are all 50


def test_rest_is_what_is_missing_even_when_almost_nothing_is(pair: tuple[Tensor, Tensor]) -> None:
    log_p, _ = pair
    torch.testing.assert_close(log_rest(log_p[:, :20])[:, 0].exp(), 1 - log_p[:, :20].exp().sum(-1))
    assert torch.isfinite(log_rest(torch.tensor([[0.0]]))).all()


def test_order_of_cached_ids_does_not_matter(pair: tuple[Tensor, Tensor]) -> None:
    log_p, log_q = pair
    logprobs, ids = log_p.topk(6)
    order = torch.randperm(6)
    one = d.reverse_kl(*on_support(log_q, ids=ids, logprobs=logprobs))
    other = d.reverse_kl(*on_support(log_q, ids=ids[:, order], logprobs=logprobs[:, order]))
    torch.testing.assert_close(one, other)
