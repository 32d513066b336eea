"""The chunked head equals the dense one: value, gradients, any chunk, bias, scale, soft-cap, padded vocabulary."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from kdcli.ops.chunked import chunk_size, head_loss, map_chunks, target_logprobs
from kdcli.ops.divergence import forward_kl, forward_kl_gradient
from kdcli.ops.head import Head

N, D, V, PADDED = 13, 8, 21, 24


def case(bias: bool, scale: float, softcap: float | None) -> tuple[Tensor, Head, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=generator).requires_grad_()
    weight = torch.randn(PADDED, D, generator=generator).requires_grad_()
    offset = torch.randn(PADDED, generator=generator).requires_grad_() if bias else None
    log_p = torch.log_softmax(torch.randn(N, V, generator=generator), -1)
    return hidden, Head(weight=weight, vocab_size=V, bias=offset, scale=scale, softcap=softcap), log_p


def chunk_loss(log_p: Tensor):
    def loss(logits: Tensor, window: slice) -> tuple[Tensor, Tensor, list[Tensor]]:
        value, gradient = forward_kl_gradient(log_p[window], torch.log_softmax(logits, -1))
        return value.sum(), gradient, []

    return loss


@pytest.mark.parametrize(
    ("bias", "scale", "softcap", "chunk"),
    list(itertools.product([False, True], [1.0, 0.3], [None, 5.0], [1, 5, N, 100])),
)
def test_equals_the_dense_loss(bias: bool, scale: float, softcap: float | None, chunk: int) -> None:
    hidden, head, log_p = case(bias, scale, softcap)
    inputs = [t for t in (hidden, head.weight, head.bias) if t is not None]
    dense = 0.7 * forward_kl(log_p, torch.log_softmax(head(hidden), -1)).sum()
    expected = torch.autograd.grad(dense, inputs)
    value = 0.7 * head_loss(hidden, head, chunk_loss(log_p), chunk)
    gradients = torch.autograd.grad(value, inputs)
    torch.testing.assert_close(value, dense, rtol=1e-5, atol=1e-6)
    for ours, reference in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-6)


def test_padded_rows_of_the_embedding_get_no_probability_and_no_gradient() -> None:
    hidden, head, log_p = case(False, 1.0, None)
    assert head(hidden).shape == (N, V)
    (gradient,) = torch.autograd.grad(head_loss(hidden, head, chunk_loss(log_p), 4), [head.weight])
    assert gradient[V:].abs().max() == 0 and gradient[:V].abs().min() > 0


def test_no_targets_give_zero_with_a_graph() -> None:
    hidden, head, log_p = case(True, 1.0, None)
    value = head_loss(hidden[:0], head, chunk_loss(log_p), 4)
    value.backward()
    assert value.item() == 0 and head.weight.grad is not None and head.weight.grad.abs().max() == 0


def test_frozen_head_and_hidden_are_respected() -> None:
    hidden, head, log_p = case(False, 1.0, None)
    head.weight.requires_grad_(False)
    head_loss(hidden, head, chunk_loss(log_p), 4).backward()
    assert head.weight.grad is None and hidden.grad is not None


def test_bfloat16_weights_accumulate_in_float32() -> None:
    """Error at most twice that of one dense bfloat16 head (the rounding of logits), however many chunks add up."""
    hidden, head, log_p = case(False, 1.0, None)
    reference = torch.autograd.grad(forward_kl(log_p, torch.log_softmax(head(hidden), -1)).sum(), [head.weight])[0]
    low = Head(weight=head.weight.detach().bfloat16().requires_grad_(), vocab_size=V)
    low_hidden = hidden.detach().bfloat16()
    dense = torch.autograd.grad(forward_kl(log_p, torch.log_softmax(low(low_hidden), -1)).sum(), [low.weight])[0]
    ours = torch.autograd.grad(head_loss(low_hidden, low, chunk_loss(log_p), 1), [low.weight])[0]
    assert (ours.float() - reference).norm() <= 2 * (dense.float() - reference).norm()


def test_autocast_runs_the_matmuls_in_its_type_and_keeps_gradients_in_the_weights() -> None:
    hidden, head, log_p = case(False, 1.0, None)
    seen = []

    def loss(logits: Tensor, window: slice) -> tuple[Tensor, Tensor, list[Tensor]]:
        seen.append(logits.dtype)
        return chunk_loss(log_p)(logits, window)

    exact = head_loss(hidden, head, chunk_loss(log_p), 4)
    with torch.autocast("cpu", torch.bfloat16):
        value = head_loss(hidden, head, loss, 4)
    value.backward()
    assert set(seen) == {torch.float32} and head.weight.grad is not None and head.weight.grad.dtype == torch.float32
    assert value.item() != exact.item() and value.item() == pytest.approx(exact.item(), rel=2e-2)


@pytest.mark.parametrize("vocab_size", [4096, 49152, 151936, 262144])
def test_chunks_fit_their_budget(vocab_size: int) -> None:
    assert 16 <= chunk_size(vocab_size, torch.device("cpu")) <= max(16, 2**27 // (4 * 6 * vocab_size))


@pytest.mark.parametrize(
    ("bias", "scale", "softcap", "chunk"),
    list(itertools.product([False, True], [1.0, 0.3], [None, 5.0], [1, 5, 100])),
)
def test_target_logprobs_equal_the_dense_ones(bias: bool, scale: float, softcap: float | None, chunk: int) -> None:
    hidden, head, _ = case(bias, scale, softcap)
    inputs = [t for t in (hidden, head.weight, head.bias) if t is not None]
    targets = torch.arange(N) % V
    coefficient = torch.linspace(-1, 2, N)  # what the loss behind them sends back
    dense = torch.log_softmax(head(hidden), -1).gather(-1, targets[:, None])[:, 0]
    values = target_logprobs(hidden, head, targets, chunk)
    torch.testing.assert_close(values, dense, rtol=1e-5, atol=1e-6)
    expected = torch.autograd.grad((coefficient * dense.square()).sum(), inputs)
    gradients = torch.autograd.grad((coefficient * values.square()).sum(), inputs)
    for ours, reference in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5)


def test_target_logprobs_of_no_targets_have_a_graph() -> None:
    hidden, head, _ = case(True, 1.0, None)
    values = target_logprobs(hidden[:0], head, torch.zeros(0, dtype=torch.long), 4)
    assert values.shape == (0,)
    assert torch.autograd.grad(values.sum(), [head.weight])[0].abs().max() == 0


@pytest.mark.parametrize("size", [1, 4, 100])
def test_mapped_chunks_are_the_whole_in_value_and_gradient(size: int) -> None:
    hidden, head, log_p = case(True, 0.3, 5.0)

    def both(h: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
        log_q = torch.log_softmax(head(h), -1)
        return forward_kl(log_p, log_q), log_q.max(-1).values

    inputs = [hidden, head.weight, head.bias]
    whole, parts = both(hidden, log_p), map_chunks(both, size, hidden, log_p)
    for ours, reference in zip(parts, whole, strict=True):
        torch.testing.assert_close(ours, reference)
    expected = torch.autograd.grad((whole[0] * whole[1]).sum(), inputs)
    for ours, reference in zip(torch.autograd.grad((parts[0] * parts[1]).sum(), inputs), expected, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-6)


def test_mapped_chunks_of_no_rows_have_their_shape_and_a_graph() -> None:
    hidden, head, _ = case(False, 1.0, None)
    values = map_chunks(lambda h: head(h).sum(-1), 4, hidden[:0])
    assert values.shape == (0,)
    assert torch.autograd.grad(values.sum(), [hidden])[0].shape == hidden.shape
