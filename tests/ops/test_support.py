"""The common support: sums to one, bounds the dense divergence, tightens with K."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kdcli.ops import divergence as d
from kdcli.ops.support import log_rest, on_support, sparse


@pytest.fixture
def pair() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    y, z = (2 * torch.randn(4, 50, generator=generator, dtype=torch.float64) for _ in range(2))
    return torch.log_softmax(y, -1), torch.log_softmax(z, -1)


@pytest.mark.parametrize("missing", ["tail", "renormalize", "teacher_only"])
def test_both_sides_sum_to_one(pair: tuple[Tensor, Tensor], missing: str) -> None:
    log_p, log_q = pair
    logprobs, ids = log_p.topk(5)
    for side in sparse(ids, logprobs, log_q, missing):  # pyright: ignore[reportArgumentType]
        torch.testing.assert_close(side.exp().sum(-1), torch.ones(4, dtype=torch.float64))


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
