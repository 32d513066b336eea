"""Losses through a language model's head, a chunk of targets at a time: no [B, T, V] is ever made.

`head_loss`: what is known per target at once; four head matmuls (student, teacher, d hidden, d weight), nothing
recomputed (PERFORMANCE 2a and 5): the gradient is formed in the forward and only scaled in the backward.
`target_logprobs`: one number per target, for losses whose gradient is known only later; the backward recomputes.
`map_chunks`: any function of rows, by autograd, recomputed in the backward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kdcli.ops.head import Head

# logits of the student's chunk [C, V] float32, slice of the targets -> summed loss (), d loss / d logits [C, V],
# d loss / d extra parameters. The logits are not read again: their buffer may become the gradient's.
ChunkLoss = Callable[[Tensor, slice], tuple[Tensor, Tensor, list[Tensor]]]


def head_loss(hidden: Tensor, head: Head, loss: ChunkLoss, chunk: int, parameters: tuple[Tensor, ...] = ()) -> Tensor:
    """Sum of `loss` over the targets: hidden [N, D] -> (), with a graph to hidden, the head and `parameters`.

    With N = 0 the result is 0 with a graph.
    """
    return _HeadLoss.apply(hidden, head.weight, head.bias, head, loss, chunk, *parameters)  # pyright: ignore


def target_logprobs(hidden: Tensor, head: Head, targets: Tensor, chunk: int) -> Tensor:
    """log softmax(head(hidden))[targets]: hidden [N, D], targets [N] -> [N] float32, with a graph to hidden and head.

    Five head matmuls; keeps the hidden states and one number per target.
    """
    return _TargetLogprobs.apply(hidden, head.weight, head.bias, head, targets, chunk)  # pyright: ignore


Result = TypeVar("Result", bound=Tensor | tuple[Tensor, ...])


def map_chunks(function: Callable[..., Result], size: int, *tensors: Tensor) -> Result:
    """`function` of `size` rows of the tensors [N, ...] at a time, its result (a tensor, or a tuple of them, with as
    many rows) joined to N rows. Under a graph nothing inside `function` is kept: the backward computes it again.

    `function` is called once with no rows where N = 0, so that the result has its shape and a graph.
    """

    def call(parts: tuple[Tensor, ...]) -> Any:
        if torch.is_grad_enabled():
            return checkpoint(function, *parts, use_reentrant=False, preserve_rng_state=False)
        return function(*parts)

    results = [call(parts) for parts in zip(*(t.split(size) for t in tensors), strict=True)]
    if isinstance(results[0], Tensor):
        return torch.cat(results)  # pyright: ignore[reportReturnType]
    return tuple(torch.cat(columns) for columns in zip(*results, strict=True))  # pyright: ignore[reportReturnType]


def chunk_size(vocab_size: int, device: torch.device, buffers: int = 6) -> int:
    """Targets per chunk so that `buffers` float32 tensors [C, V] take about 128 MiB on a CPU, 1 GiB on a GPU."""
    budget = 2**30 if device.type == "cuda" else 2**27
    size = budget // (4 * buffers * vocab_size)
    return max(16, size - size % 16)


def rows_at_once(logits: Tensor) -> int:
    """How many rows of a chunk's logits [C, V] to turn into their gradient at a time: on a CPU so many that the
    buffers in between stay in its cache (4 MiB each: a fifth less time than a whole chunk), on a GPU all."""
    return logits.shape[0] if logits.is_cuda else max(4, 2**20 // logits.shape[1])


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
        gradients = _Gradients(hidden, weight, bias, head, ctx.needs_input_grad)
        total = hidden.new_zeros((), dtype=torch.float32)
        d_parameters = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, hidden.shape[0], chunk):
                window = slice(start, min(start + chunk, hidden.shape[0]))
                h, logits, slope = gradients.chunk(window)
                value, d_logits, d_extra = loss(logits, window)
                del logits
                total += value
                for buffer, gradient in zip(d_parameters, d_extra, strict=True):
                    buffer += gradient
                gradients.add(window, h, d_logits, slope)
                del d_logits, slope
        ctx.gradients, ctx.d_parameters = gradients, d_parameters
        ctx.parameter_dtypes = [p.dtype for p in parameters]
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        (scale,) = grad_outputs
        gradients, d_parameters = ctx.gradients, ctx.d_parameters
        ctx.gradients = ctx.d_parameters = None  # used once: scaled in place, so a second backward would be wrong
        extra = [g.mul_(scale).to(dtype) for g, dtype in zip(d_parameters, ctx.parameter_dtypes, strict=True)]
        return *gradients.result(scale), None, None, None, *extra


class _TargetLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, head: Head, targets: Tensor, chunk: int
    ) -> Tensor:
        values = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
        normalizer = torch.empty_like(values)  # log of the sum that a softmax divides by
        ctx.compute = compute_dtype(hidden, weight)
        with torch.autocast(hidden.device.type, enabled=False):
            cast = head.cast(ctx.compute)
            for start in range(0, hidden.shape[0], chunk):
                window = slice(start, start + chunk)
                logits = cast(hidden[window].detach().to(ctx.compute))
                normalizer[window] = torch.logsumexp(logits, dim=-1)
                values[window] = logits.gather(-1, targets[window].unsqueeze(-1)).squeeze(-1) - normalizer[window]
        ctx.save_for_backward(hidden, weight, bias, targets, normalizer)
        ctx.head, ctx.size = head, chunk
        return values

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        (coefficient,) = grad_outputs  # [N]
        hidden, weight, bias, targets, normalizer = ctx.saved_tensors
        head = replace(ctx.head, weight=weight, bias=bias)
        gradients = _Gradients(hidden, weight, bias, head, ctx.needs_input_grad, ctx.compute)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, hidden.shape[0], ctx.size):
                window = slice(start, min(start + ctx.size, hidden.shape[0]))
                h, logits, slope = gradients.chunk(window)
                share = coefficient[window].unsqueeze(-1)
                d_logits = logits.sub_(normalizer[window].unsqueeze(-1)).exp_().mul_(-share)  # c (onehot - q)
                d_logits.scatter_add_(-1, targets[window].unsqueeze(-1), share)
                gradients.add(window, h, d_logits, slope)
        return *gradients.result(), None, None, None


class _Gradients:
    """Gradients of a head's hidden states, weight and bias, accumulated over chunks, the latter two in float32."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        wanted: Any,  # of hidden and of weight, as autograd says
        dtype: torch.dtype | None = None,
    ) -> None:
        self.hidden, self.head = hidden, head
        self.dtype = dtype or compute_dtype(hidden, weight)
        self.cast = head.cast(self.dtype)
        self.d_hidden = torch.zeros_like(hidden) if wanted[0] else None
        self.d_weight = torch.zeros_like(weight, dtype=torch.float32) if wanted[1] else None
        self.d_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        self.dtypes = (weight.dtype, None if bias is None else bias.dtype)

    def chunk(self, window: slice) -> tuple[Tensor, Tensor, Tensor | None]:
        """Hidden states [C, D] and logits [C, V] of a chunk, and the slope of its soft-cap, if there is one."""
        h = self.hidden[window].detach().to(self.dtype)
        logits = self.cast(h)
        cap = self.head.softcap  # d softcap(z) / dz = 1 - tanh(z / s)^2
        return h, logits, None if cap is None else 1 - (logits / cap).square_()

    def add(self, window: slice, h: Tensor, d_logits: Tensor, slope: Tensor | None) -> None:
        """Add what d_logits [C, V] sends back. `d_logits` may be changed."""
        head = self.head
        if slope is not None:
            d_logits = d_logits.mul_(slope)
        if head.scale != 1.0:
            d_logits = d_logits.mul_(head.scale)
        if self.d_bias is not None:
            self.d_bias[: head.vocab_size] += d_logits.sum(0)
        if self.d_weight is not None:
            _add_outer(self.d_weight[: head.vocab_size], d_logits, h)
        if self.d_hidden is not None:
            self.d_hidden[window] = (d_logits.to(self.dtype) @ self.cast.weight).to(self.hidden.dtype)

    def result(self, scale: Tensor | None = None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The three gradients, multiplied by `scale`, in the types of their tensors."""
        kinds = (self.hidden.dtype, *self.dtypes)
        found = zip((self.d_hidden, self.d_weight, self.d_bias), kinds, strict=True)
        scaled = [(g if g is None or scale is None else g.mul_(scale), kind) for g, kind in found]
        d_hidden, d_weight, d_bias = (None if g is None else g.to(kind) for g, kind in scaled)
        return d_hidden, d_weight, d_bias


def _add_outer(accumulator: Tensor, d_logits: Tensor, hidden: Tensor) -> None:
    """accumulator [V, D] float32 += d_logits.T @ hidden, accumulated in float32."""
    if d_logits.is_cuda and hidden.dtype != torch.float32:
        accumulator.add_(torch.mm(d_logits.to(hidden.dtype).T, hidden, out_dtype=torch.float32))
    else:  # on CPUs the bfloat16 units gain nothing for this product
        accumulator.addmm_(d_logits.T, hidden.float())
