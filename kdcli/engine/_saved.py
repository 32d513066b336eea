"""The weights of a DeepSpeed checkpoint, read one by one, without an engine: of any stage and number of ranks."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def weights(folder: Path) -> Mapping[str, Callable[[], Tensor]]:
    """By name; files are mapped into memory, so that only what is called for is read.

    Stages 0 to 2 save the module whole, in the type it is trained in. Stage 3 saves each rank's parts of the
    optimizer's 32-bit copy; what is frozen is saved in parts that DeepSpeed joins all at once.
    """
    if json.loads((folder / "engine.json").read_text("utf-8"))["stage"] < 3:
        path = next(folder.glob("mp_rank_*_model_states.pt"))
        module = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["module"]
        return {name: partial(_itself, value) for name, value in module.items() if isinstance(value, Tensor)}
    from deepspeed.utils import zero_to_fp32

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        joined: Any = zero_to_fp32._get_fp32_state_dict_from_zero_checkpoint(str(folder), False)
    return {name: value.contiguous for name, value in joined.items()}


def _itself(value: Tensor) -> Tensor:
    return value
