"""The common support: sums to one, bounds the dense divergence, tightens with K."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kdcli.api import TopK
from kdcli.ops import divergence as d
from kdcli.ops.support import Missing, cut_topk, log_rest, on_support, sparse, student_side, teacher_side

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


# ---------------------------------------------------------------------------------------- entries that stand for none


def with_none(ids: Tensor, logprobs: Tensor, *, id_: int, count: int = 3) -> tuple[Tensor, Tensor]:
    """The same entries among `count` that stand for none, all of one id."""
    nothing = torch.full((*ids.shape[:-1], count), -math.inf, dtype=logprobs.dtype)
    wider = torch.cat([ids, torch.full_like(nothing, id_, dtype=torch.int64)], -1), torch.cat([logprobs, nothing], -1)
    order = torch.randperm(ids.shape[-1] + count, generator=torch.Generator().manual_seed(count))
    return wider[0][..., order], wider[1][..., order]


@pytest.mark.parametrize("id_", [0, 7, 49, 10_000])  # perhaps one that is there, perhaps no id at all
@pytest.mark.parametrize("temperature", [1.0, 0.1, 2.5])
@pytest.mark.parametrize("missing", MISSING)
def test_an_entry_that_stands_for_none_changes_nothing(
    pair: tuple[Tensor, Tensor], missing: Missing, temperature: float, id_: int
) -> None:
    """Neither value nor gradient of a divergence, by autograd or in closed form."""
    log_p, z = pair
    logprobs, ids = log_p.topk(5)
    found = []
    for own_ids, own_logprobs in ((ids, logprobs), with_none(ids, logprobs, id_=id_)):
        leaf = z.clone().requires_grad_()
        sides = sparse(own_ids, own_logprobs, torch.log_softmax(leaf / temperature, -1), missing)
        value = d.generalized_jsd(*sides) + d.reverse_kl(*sides) + d.forward_kl(*sides)
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
        log_q, back = student_side(z, own_ids, temperature, missing, logprobs=own_logprobs)
        torch.testing.assert_close(log_q, sides[1].detach(), rtol=1e-12, atol=1e-12)
        slope = log_q.exp() - teacher_side(own_logprobs, z, missing).exp()  # of the forward KL
        found.append((value, gradient, back(slope)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("missing", MISSING)
def test_a_target_of_which_nothing_is_known_has_no_divergence_and_no_gradient(
    pair: tuple[Tensor, Tensor], missing: Missing
) -> None:
    z = pair[1].clone().requires_grad_()
    ids, nothing = torch.arange(4).expand(4, 4), torch.full((4, 4), -math.inf, dtype=torch.float64)
    value = d.forward_kl(*sparse(ids, nothing, torch.log_softmax(z, -1), missing))
    (gradient,) = torch.autograd.grad(value.sum(), z)
    assert torch.isfinite(gradient).all() and torch.isfinite(value).all()
    if missing == "tail":  # all of the mass is the rest's, on both sides
        torch.testing.assert_close(value.detach(), torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-6)
        assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize("missing", MISSING)
def test_the_whole_vocabulary_beside_entries_that_stand_for_none_is_the_dense_teacher(
    pair: tuple[Tensor, Tensor], missing: Missing
) -> None:
    """In one row 50 ids of 50, in another 20: where nothing is left there is no rest."""
    log_p, z = pair
    logprobs, ids = log_p.topk(50)
    ids, logprobs = with_none(ids, logprobs, id_=3)
    leaf = z.clone().requires_grad_()
    value = d.reverse_kl(*sparse(ids, logprobs, torch.log_softmax(leaf, -1), missing))
    dense = d.reverse_kl(log_p, torch.log_softmax(leaf, -1))
    torch.testing.assert_close(value, dense)
    torch.testing.assert_close(*(torch.autograd.grad(v.sum(), leaf, retain_graph=True)[0] for v in (value, dense)))
    some = logprobs.clone()
    some[1] = some[1].masked_fill(some[1] < some[1].topk(20)[0][-1], -math.inf)
    log_q, back = student_side(z, ids, 1.0, missing, logprobs=some)
    assert torch.isfinite(log_q).all()
    expected, of_some = log_p[0].exp(), teacher_side(some, z, missing)
    gradient = back(log_q.exp() - of_some.exp())
    torch.testing.assert_close(gradient[0], torch.softmax(z[0], -1) - expected)
    assert torch.isfinite(gradient).all()


def test_cutting_top_k_to_the_shared_ids_is_cutting_the_logits() -> None:
    """A teacher of 60 ids, a student of 50: softmax over the first 50 of the teacher's logits."""
    y = 2 * torch.randn(1, 6, 60, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    logprobs, ids = torch.log_softmax(y, -1).topk(60)
    cut = cut_topk(TopK(ids=ids, logprobs=logprobs), 50)
    assert int(cut.ids.max()) < 50
    z = torch.randn(1, 6, 50, dtype=torch.float64)
    dense = d.forward_kl(torch.log_softmax(y[..., :50], -1), torch.log_softmax(z, -1))
    torch.testing.assert_close(d.forward_kl(*sparse(cut.ids, cut.logprobs, torch.log_softmax(z, -1))), dense)
    few = cut_topk(TopK(ids=ids[..., :8], logprobs=logprobs[..., :8]), 50)
    known = few.logprobs.exp().sum(-1)  # what is beyond the 8 is not known, so only what was seen there is taken off
    seen = torch.where(ids[..., :8] < 50, logprobs[..., :8].exp(), 0).sum(-1)
    torch.testing.assert_close(known, seen / (1 - logprobs[..., :8].exp().sum(-1) + seen))
    assert cut_topk(cut, None) is cut
