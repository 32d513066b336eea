"""Exact counters: FLOPs, live tensor bytes at their peak, the largest tensor made; and seconds of a CPU or a GPU."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Cost:
    flops: int
    peak_bytes: int  # of tensors made during the call, on top of what was there before
    largest: int  # elements of the largest tensor made


def exact(step: Callable[[], Any], device: torch.device = CPU) -> Cost:
    """Run `step` once and count. The same numbers every time, whatever else the machine does.

    On a GPU the peak is the allocator's, which counts what kernels take for themselves too.
    """
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _addmm_flops})
    tracker = _Tracker()
    before = _reset_peak(device)
    with ExitStack() as stack:
        stack.enter_context(tracker)
        stack.enter_context(counter)
        step()
    peak = torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else tracker.peak
    return Cost(flops=counter.get_total_flops(), peak_bytes=peak, largest=tracker.largest)


def seconds(step: Callable[[], Any], device: torch.device = CPU) -> float:
    """CPU seconds of one call (process time: what other processes do does not count), or seconds of the GPU."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        step()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / 1000
    began = time.process_time()
    step()
    return time.process_time() - began


def _reset_peak(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _addmm_flops(self_shape: Any, a_shape: Any, b_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """In-place addmm, which torch's counter does not know: 2 M K N."""
    (m, k), (_, n) = a_shape, b_shape
    return 2 * m * k * n


class _Tracker(TorchDispatchMode):
    """Bytes of storages alive, each counted from the operation that made it until it is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.known: weakref.WeakSet[Any] = weakref.WeakSet()
        self.now = self.peak = self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {t.untyped_storage() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._see(tensor, before)
        return out

    def _see(self, tensor: Tensor, before: set[Any]) -> None:
        storage = tensor.untyped_storage()
        if storage in self.known or storage in before:
            return
        size = storage.nbytes()
        self.known.add(storage)
        weakref.finalize(storage, self._free, size)
        self.now += size
        self.peak = max(self.peak, self.now)
        self.largest = max(self.largest, tensor.numel())

    def _free(self, size: int) -> None:
        self.now -= size
