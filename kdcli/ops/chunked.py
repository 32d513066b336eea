"""Losses through a language model's head, a chunk of targets at a time: no [B, T, V] is ever made.

PERFORMANCE 2a and 5: four head matmuls (student, teacher, d hidden, d weight), nothing recomputed. The gradient is
formed in the forward, chunk by chunk, and only scaled in the backward; weight gradients accumulate in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kdcli.ops.head import Head

# logits of the student's chunk [C, V] float32, slice of the targets -> summed loss (), d loss / d logits [C, V],
# d loss / d extra parameters
ChunkLoss = Callable[[Tensor, slice], tuple[Tensor, Tensor, list[Tensor]]]


def head_loss(hidden: Tensor, head: Head, loss: ChunkLoss, chunk: int, parameters: tuple[Tensor, ...] = ()) -> Tensor:
    """Sum of `loss` over the targets: hidden [N, D] -> (), with a graph to hidden, the head and `parameters`.

    With N = 0 the result is 0 with a graph (METHODS D15).
    """
    return _HeadLoss.apply(hidden, head.weight, head.bias, head, loss, chunk, *parameters)  # pyright: ignore


def chunk_size(vocab_size: int, device: torch.device, buffers: int = 6) -> int:
    """Targets per chunk so that `buffers` float32 tensors [C, V] take about 128 MiB on a CPU, 1 GiB on a GPU."""
    budget = 2**30 if device.type == "cuda" else 2**27
    size = budget // (4 * buffers * vocab_size)
    return max(16, size - size % 16)


def compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """What the matmuls run in: autocast's type inside autocast, else the weight's."""
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        loss: ChunkLoss,
        chunk: int,
        *parameters: Tensor,
    ) -> Tensor:
        dtype = compute_dtype(hidden, weight)
        cast = head.cast(dtype)
        total = hidden.new_zeros((), dtype=torch.float32)
        d_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        d_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        d_parameters = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, hidden.shape[0], chunk):
                window = slice(start, min(start + chunk, hidden.shape[0]))
                h = hidden[window].detach().to(dtype)
                logits = cast(h)
                saved = logits / head.softcap if head.softcap is not None else None
                value, d_logits, d_extra = loss(logits, window)
                del logits
                total += value
                if saved is not None:  # d softcap(z) / dz = 1 - tanh(z / s)^2
                    d_logits = d_logits * (1 - saved * saved)
                if head.scale != 1.0:
                    d_logits = d_logits * head.scale
                if d_bias is not None:
                    d_bias[: head.vocab_size] += d_logits.sum(0)
                for buffer, gradient in zip(d_parameters, d_extra, strict=True):
                    buffer += gradient
                if d_weight is not None:
                    _add_outer(d_weight[: head.vocab_size], d_logits, h)
                if d_hidden is not None:
                    d_hidden[window] = (d_logits.to(dtype) @ cast.weight).to(hidden.dtype)
                del d_logits, saved
        ctx.gradients = (d_hidden, d_weight, d_bias, d_parameters)
        ctx.dtypes = (weight.dtype, None if bias is None else bias.dtype, [p.dtype for p in parameters])
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        (scale,) = grad_outputs
        d_hidden, d_weight, d_bias, d_parameters = ctx.gradients
        weight_dtype, bias_dtype, parameter_dtypes = ctx.dtypes
        ctx.gradients = None  # used once: scaled in place, so a second backward would be wrong
        if d_hidden is not None:
            d_hidden = d_hidden.mul_(scale)
        if d_weight is not None:
            d_weight = d_weight.mul_(scale).to(weight_dtype)
        if d_bias is not None:
            d_bias = d_bias.mul_(scale).to(bias_dtype)
        extra = [g.mul_(scale).to(dtype) for g, dtype in zip(d_parameters, parameter_dtypes, strict=True)]
        return d_hidden, d_weight, d_bias, None, None, None, *extra


def _add_outer(accumulator: Tensor, d_logits: Tensor, hidden: Tensor) -> None:
    """accumulator [V, D] float32 += d_logits.T @ hidden, accumulated in float32."""
    if d_logits.is_cuda and hidden.dtype != torch.float32:
        accumulator.add_(torch.mm(d_logits.to(hidden.dtype).T, hidden, out_dtype=torch.float32))
    else:  # on CPUs the bfloat16 units gain nothing for this product
        accumulator.addmm_(d_logits.T, hidden.float())
