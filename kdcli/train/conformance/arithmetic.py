"""Two ways to run somebody's function: all of it in float64, and with what it detaches held fixed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode


@contextmanager
def float64() -> Iterator[None]:
    """Whatever asks for float32 gets float64: losses rightly say `.float()`, which would round what is measured."""
    known = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Widened():
            yield
    finally:
        torch.set_default_dtype(known)


def backward(values: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of the sum of values, where what checkpointing computes again is in `float64()` too if this call is.

    torch.autograd.grad lifts that before it begins, so the engine behind it is asked.
    """
    total = values.sum()
    found = _engine_run_backward(
        (total,), (torch.ones_like(total),), False, False, tuple(inputs), allow_unreachable=True, accumulate_grad=False
    )
    return [torch.zeros_like(i) if g is None else g for i, g in zip(inputs, found, strict=True)]


class _Widened(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            return Tensor.double(*args, **(kwargs or {}))
        if kwargs and kwargs.get("dtype") is torch.float32:
            kwargs = {**kwargs, "dtype": torch.float64}
        if any(argument is torch.float32 for argument in args):
            args = tuple(torch.float64 if argument is torch.float32 else argument for argument in args)
        return func(*args, **(kwargs or {}))


class Detached(TorchFunctionMode):
    """Records, in order, what is detached or computed under `torch.no_grad`, or gives back what was recorded.

    What a torch.autograd.Function computes is no such part, though its forward runs without a graph too.
    """

    def __init__(self, tape: list[Tensor], *, replay: bool) -> None:
        super().__init__()
        self.tape, self.replay = tape, replay
        self.next, self.frozen = 0, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._C._set_grad_enabled:
            self.frozen = not args[0]
        result = func(*args, **(kwargs or {}))
        detached = self.frozen or (torch.is_grad_enabled() and func in (Tensor.detach, torch.detach))
        if not (detached and isinstance(result, Tensor) and result.is_floating_point()):
            return result
        if not self.replay:
            self.tape.append(result)
            return result
        self.next += 1
        return self.tape[self.next - 1]
