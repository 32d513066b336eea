"""A frozen transformers causal language model whose parameters are cut among the ranks (ZeRO-3, arXiv:1910.02054)."""

from __future__ import annotations

import logging
from typing import Any, Unpack

import torch
from torch import Tensor

from kdcli.api import Engine
from kdcli.store.adapters import require
from kdcli.teacher._hf import Frozen, Settings

log = logging.getLogger(__name__)


class HFShardedTeacher(Frozen):
    """Each rank keeps 1 / R of every matrix, R ranks, also while loading, and layers are gathered while they run: the
    engine's stage is the student's alone. Every rank must annotate equally often.

    The head's weight [V', D] is kept whole on every rank beside that, gathered once: the loss reads it from the
    teacher's pass to the end of the student's, when memory is fullest, so gathering it anew for each micro-batch would
    send it again and save nothing. So is that of the embedding, from the first batch that needs HIDDEN.

    Raises ConfigError without accelerate, through which transformers loads a partitioned model.
    """

    def __init__(self, **settings: Unpack[Settings]) -> None:
        require("accelerate", "large", "teacher=hf_sharded")
        super().__init__(**settings)  # pyright: ignore[reportCallIssue]
        self._engine: Engine | None = None

    def place(self, engine: Engine) -> None:
        self._engine = engine

    def load(self, device: torch.device) -> None:
        engine = self._placed
        if engine.world_size == 1:
            log.info("teacher: one process, so hf_sharded splits nothing; teacher=hf is the same and faster")
        self._load("meta", {"device_map": "meta"})  # refuses wrong weights on every rank; the loading below on one
        self._take(engine.sharded(lambda: self._load(device), getattr(torch, self.dtype)))
        if not self.tied:
            self.frozen.set_output_embeddings(None)  # its part of the head, which nobody reads any more

    @property
    def _placed(self) -> Engine:
        assert self._engine is not None, "place() comes before load()"
        return self._engine

    def _whole(self, parameter: Any) -> Tensor:
        with self._placed.whole([parameter]):
            return parameter.detach().clone()
