"""A frozen transformers causal language model whose matrices are cut among the ranks, which multiply their parts
together: tensor parallelism (Megatron-LM, arXiv:1909.08053), by the plan that transformers has for its family."""

from __future__ import annotations

import logging
from typing import Any, Unpack

import torch
from torch import Tensor

from kdcli.api import Engine, Need
from kdcli.errors import ConfigError
from kdcli.store.layers import Layers, run
from kdcli.teacher._hf import Frozen, Settings

log = logging.getLogger(__name__)


class HFTensorParallelTeacher(Frozen):
    """Each of R ranks keeps 1 / R of every matrix and sends activations, where `hf_sharded` sends parameters: less
    traffic if micro-batches have fewer tokens than a layer is wide, and links as fast as between GPUs of one machine.

    A product needs the same batch on every rank, and data parallelism gives each its own: so ranks tell each other
    their ids, run every rank's micro-batch together, one after the other, and keep the states of their own. Every rank
    must annotate equally often. The head's weight [V', D] is kept whole on every rank, as `hf_sharded` has it. Heads
    are cut among ranks, so there is neither ATTENTION nor RELATIONS.

    Raises ConfigError, before weights load, for a family without a plan, or heads that R does not divide.
    """

    def __init__(self, **settings: Unpack[Settings]) -> None:
        super().__init__(**settings)  # pyright: ignore[reportCallIssue]
        self.provides &= ~(Need.ATTENTION | Need.RELATIONS)
        self._engine: Engine | None = None

    def place(self, engine: Engine) -> None:
        self._engine = engine
        if engine.world_size > 1:
            self._check(engine.world_size)

    def load(self, device: torch.device) -> None:
        assert self._engine is not None, "place() comes before load()"
        if self._engine.world_size == 1:
            log.info("teacher: one process, so hf_tensor_parallel splits nothing; teacher=hf is the same")
            return self._take(self._load(device))
        from transformers.distributed.configuration_utils import DistributedConfig

        plan = DistributedConfig(tp_plan="auto", tp_size=self._engine.world_size)
        self._take(_compacted(self._load(device, {"distributed_config": plan})))

    def _check(self, ranks: int) -> None:
        config = self.architecture()
        if not getattr(config.get_text_config(), "base_model_tp_plan", None):
            raise ConfigError(
                f"teacher.path: transformers has no plan to cut a {config.model_type} model among processes; set "
                "teacher=hf_sharded, which cuts any"
            )
        shape = self.shape()
        uneven = [n for n in (shape.heads, shape.kv_heads) if n % ranks]
        if uneven:
            raise ConfigError(
                f"teacher.path: {uneven[0]} heads cannot be dealt to {ranks} processes; set launch.processes to a "
                "divisor, or teacher=hf_sharded, which cuts any model"
            )

    def _run(self, inputs: dict[str, Any], needs: Need) -> Layers:
        engine = self._engine
        assert engine is not None, "place() comes first"
        if engine.world_size == 1:
            return run(self.frozen, inputs, needs)
        own: Layers | None = None
        for rank, told in enumerate(engine.gather(_moved(inputs, "cpu"))):
            layers = run(self.frozen, _moved(told, engine.device), needs)
            own = layers if rank == engine.rank else own
        assert own is not None, "a rank is among its peers"
        return own

    def _whole(self, parameter: Any) -> Tensor:
        return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


@torch.no_grad()
def _compacted(model: Any) -> Any:
    """The model with memory of its own for each part: on a CPU transformers leaves it a view of the whole matrix."""
    for parameter in model.parameters():
        part = getattr(parameter, "_local_tensor", parameter)  # `to_local` hands out another tensor of that memory
        if part.untyped_storage().nbytes() > part.numel() * part.element_size():
            part.set_(part.clone())
    return model


def _moved(inputs: dict[str, Any], device: torch.device | str) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
