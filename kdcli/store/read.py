"""What a linear layer reads while its model runs, and the proof that a model's logits are that layer's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from kdcli.errors import ConfigError

_PROVEN: WeakSet[Any] = WeakSet()  # models whose logits have been compared


@dataclass
class Read:
    """What a linear layer was given; and once per model what it made of it."""

    given: Tensor
    made: Tensor | None = None

    def prove(self, model: Any, logits: Tensor, bias: Tensor | None = None, row: Tensor | None = None) -> None:
        """Once per model: `logits` are what the layer made (of position `row` [B], where it reads every position), plus
        `bias`. Raises ConfigError where they are not, so that hidden states and head would say something else."""
        if self.made is None:
            return
        made = self.made if row is None else self.made[torch.arange(len(row), device=row.device), row]
        expected = made.detach() if bias is None else made.detach() + bias
        if expected.shape != logits.shape or not torch.allclose(expected.float(), logits.detach().float(), 1e-2, 1e-3):
            raise ConfigError(
                f"{type(model).__name__}: its logits are not what its last linear layer makes, so they cannot be "
                "compared; take a model whose head ends in a linear layer"
            )
        _PROVEN.add(model)


@contextmanager
def what_reads(model: Any, linear: nn.Module, *, empty: bool = False) -> Iterator[list[Read]]:
    """The input of `linear`, once `model` has run inside. `empty`: once its logits are proven, it is given none of the
    positions itself, so that no logits of a vocabulary are made."""
    seen: list[Read] = []
    proven = model in _PROVEN

    def before(module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
        seen.append(Read(given[0]))
        return (given[0][:, :0], *given[1:]) if empty and proven else None

    def after(module: nn.Module, given: tuple[Any, ...], output: Tensor) -> None:
        if not proven:
            seen[-1].made = output

    handles = [linear.register_forward_pre_hook(before), linear.register_forward_hook(after)]
    try:
        yield seen
    finally:
        for handle in handles:
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
