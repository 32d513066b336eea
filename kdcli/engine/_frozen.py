"""A frozen model under ZeRO-3's partitioning, next to a student of any stage; and parameters gathered for reading.

Only matrices are partitioned. Vectors (norms, biases) stay whole once they are used: each would cost a message per
pass, and all of them are a thousandth of a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

PRECISIONS = {
    torch.float32: {},
    torch.bfloat16: {"bf16": {"enabled": True}},
    torch.float16: {"fp16": {"enabled": True}},
}
AHEAD, LIVE = 50_000_000, 1_000_000_000  # parameters fetched at a time, and whole at a time: DeepSpeed's own bounds


def whole(parameters: Iterable[nn.Parameter]) -> AbstractContextManager[None]:
    """Inside, those that any engine has partitioned are whole on every rank. A collective."""
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters, ZeroParamStatus

    away = [p for p in parameters if getattr(p, "ds_status", None) is ZeroParamStatus.NOT_AVAILABLE]
    return GatheredParameters(away) if away else nullcontext()  # pyright: ignore[reportReturnType]


class Frozen:
    """The model that `load` builds, in `dtype`: each parameter is cut among the ranks as soon as it is made, and filled
    by rank 0 from its memory-mapped file."""

    def __init__(self, load: Callable[[], Any], dtype: torch.dtype) -> None:
        import deepspeed

        self.model = _partitioned(load, dtype).requires_grad_(False)
        self._engine: Any = deepspeed.initialize(
            model=self.model, config=_config(self.model), dist_init_required=False
        )[0]
        self._coordinator = self._engine.optimizer.get_param_coordinator()
        self._whole_model = False  # a pass through the head too is under way
        self._hooks = [
            self.model.register_forward_pre_hook(lambda *_: self._mark(True)),
            self.model.register_forward_hook(lambda *_: self._mark(False), always_call=True),
        ]
        if self.model.base_model is not self.model:
            self._hooks.append(self.model.base_model.register_forward_pre_hook(self._begin, prepend=True))

    def _mark(self, whole_model: bool) -> None:
        self._whole_model = whole_model

    def _begin(self, *_: Any) -> None:
        """DeepSpeed sees a pass begin where the outermost module is called; distillation leaves the head out."""
        if not self._whole_model:
            self._coordinator.reset_step()

    def close(self) -> None:
        """Take DeepSpeed's hooks off the model, and the model out of DeepSpeed's list of what is running."""
        from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

        for hook in self._hooks:
            hook.remove()
        self._engine.destroy()
        FWD_MODULE_STACK[:] = [module for module in FWD_MODULE_STACK if module is not self.model]


def _partitioned(load: Callable[[], Any], dtype: torch.dtype) -> Any:
    """transformers partitions whatever it loads while such a config is alive, whichever rank asks: one that loads
    something by itself would wait for the others for ever, so it does not outlive the loading."""
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    alive = HfDeepSpeedConfig({**_settings({"stage": 3}), **PRECISIONS[dtype]})
    try:
        return load()
    finally:
        unset_hf_deepspeed_config()
        del alive


def _config(model: Any) -> dict[str, Any]:
    """Without a precision: the parameters have theirs, and nothing is trained."""
    sizes = [(len(p.ds_shape), p.ds_numel) for p in model.parameters()]
    total = sum(size for _, size in sizes)
    zero = {
        "stage": 3,
        "stage3_param_persistence_threshold": max((size for dimensions, size in sizes if dimensions < 2), default=0),
        # Each of a layer's modules fetches ahead of its own: without a bound, all of a small model is whole at once.
        "stage3_prefetch_bucket_size": min(AHEAD, total // 20),
        "stage3_max_live_parameters": min(LIVE, total // 10),
    }
    return _settings(zero)


def _settings(zero: dict[str, Any]) -> dict[str, Any]:
    return {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero, "steps_per_print": 10**9}
