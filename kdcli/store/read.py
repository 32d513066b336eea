"""What a linear layer reads while its model runs, and the proof that a model's logits are that layer's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kdcli.errors import ConfigError


@contextmanager
def what_reads(linear: nn.Module, *, empty: bool = False) -> Iterator[list[Tensor]]:
    """The inputs of `linear`, once the model has run inside. `empty`: it is given none of their positions itself, so
    that no logits of a vocabulary are made."""
    seen: list[Tensor] = []

    def hook(module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
        del module
        seen.append(given[0])
        return (given[0][:, :0], *given[1:]) if empty else None

    handle = linear.register_forward_pre_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()


def last_linear(model: Any, classes: int) -> nn.Linear:
    """The layer of a classifier that makes the logits of its classes. Raises ConfigError where there is none."""
    inside = {id(module) for module in model.base_model.modules()} if model.base_model is not model else set()
    found = [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear) and module.out_features == classes and id(module) not in inside
    ]
    if not found:
        raise ConfigError(
            f"{type(model).__name__} has no linear layer of {classes} classes behind its encoder, so its logits cannot "
            "be compared; take a model such as BERT, RoBERTa, DistilBERT or DeBERTa"
        )
    return found[-1]  # heads register their layers in the order in which they run


@torch.no_grad()
def require_logits(model: Any, made: Tensor, expected: Tensor) -> None:
    """Raises ConfigError where hidden states and head do not give what the model itself gives."""
    tolerance = 1e-4 if made.dtype == torch.float32 and expected.dtype == torch.float32 else 5e-2
    scale = expected.float().abs().max().clamp(min=1.0)
    if not bool(((made.float() - expected.float()).abs().max() <= tolerance * scale).item()):
        raise ConfigError(
            f"{type(model).__name__}: its logits are not what its last linear layer makes, so they cannot be compared; "
            "take a model whose head ends in a linear layer"
        )
