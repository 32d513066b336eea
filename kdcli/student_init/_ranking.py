"""Which layers a model can do without: by the loss without them, or by how little they change what passes through.

Letters: L layers, N targets or tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kdcli.api import Batch
from kdcli.errors import ConfigError
from kdcli.ops.head import Head
from kdcli.store.layers import stack
from kdcli.student_init._calibrate import evaluating, nats_of

Importance = Literal["leave_one_out", "block_influence", "angular"]


def kept_layers(
    model: Any, vocab_size: int, rows: Sequence[Batch], keep: int, *, importance: Importance, greedy: bool = False
) -> list[int]:
    """The `keep` layers to keep, in order. Of equal layers the earlier goes."""
    total = len(stack(model)[1])
    if keep == total:
        return list(range(total))
    with evaluating(model):
        if importance == "angular":
            distances = angular_distance(model, rows, total - keep)
            start = distances.index(min(distances))
            return [layer for layer in range(total) if not start <= layer < start + total - keep]
        if importance == "block_influence":
            scores = block_influence(model, rows)
            return _without(scores, total - keep)
        head = Head.of(model, vocab_size)
        if not greedy:
            return _without(losses_without(model, head, rows), total - keep)
        dropped: set[int] = set()
        while len(dropped) < total - keep:
            losses = losses_without(model, head, rows, dropped)
            dropped.add(min(losses, key=lambda layer: (losses[layer], layer)))
        return [layer for layer in range(total) if layer not in dropped]


def check_keep(keep: int, total: int, setting: str) -> None:
    """Raises ConfigError unless 1 <= keep <= total."""
    if not 1 <= keep <= total:
        raise ConfigError(f"student_init.{setting} is {keep}; the model has {total} layers, so give 1 to {total}")


def losses_without(model: Any, head: Head, rows: Sequence[Batch], dropped: Collection[int] = ()) -> dict[int, float]:
    """Layer -> nats per target when it is skipped too, for every layer that is not of `dropped`.

    What comes before the layer is computed once per batch, so this costs L / 2 passes instead of L.
    """
    layers = stack(model)[1]
    left = [layer for layer in range(len(layers)) if layer not in dropped]
    sums = dict.fromkeys(left, 0.0)
    for batch in rows:
        with _replaced(layers, dict.fromkeys(dropped, _handed_on)):
            passing, _ = _passing(model, layers, batch)
        for layer in left:
            given = passing[layer]
            skipped: dict[int, Callable[[Tensor], Tensor]] = dict.fromkeys([*range(layer), *dropped], _handed_on)
            with _replaced(layers, skipped | {layer: lambda _, given=given: given}):
                sums[layer] += nats_of(model.base_model(**batch.model_inputs()).last_hidden_state, batch, head)
    targets = sum(int(batch.mask.sum()) for batch in rows)
    return {layer: total / targets for layer, total in sums.items()}


def block_influence(model: Any, rows: Sequence[Batch]) -> dict[int, float]:
    """Layer -> 1 - mean cosine of what enters and what leaves it, over tokens: ShortGPT, arXiv:2403.03853, Eq. 1."""
    layers = stack(model)[1]
    sums, tokens = dict.fromkeys(range(len(layers)), 0.0), 0
    for batch in rows:
        states = _states(model, layers, batch)
        tokens += states[0].shape[0]
        for layer in sums:
            sums[layer] += float((1 - _cosine(states[layer], states[layer + 1])).sum())
    return {layer: total / tokens for layer, total in sums.items()}


def angular_distance(model: Any, rows: Sequence[Batch], size: int) -> list[float]:
    """For each block of `size` layers, by its first: arccos(cosine of what enters and what leaves it) / pi, averaged
    (arXiv:2403.17887, Eq. 7).

    Departs from the paper, which takes the last token of long documents: over all tokens, because the last of a
    row is mostly the token that ends it.
    """
    layers = stack(model)[1]
    sums, tokens = [0.0] * (len(layers) - size + 1), 0
    for batch in rows:
        states = _states(model, layers, batch)
        tokens += states[0].shape[0]
        for start in range(len(sums)):
            cosine = _cosine(states[start], states[start + size]).clamp(-1.0, 1.0)
            sums[start] += float((torch.arccos(cosine) / math.pi).sum())
    return [total / tokens for total in sums]


def _without(scores: Mapping[int, float], number: int) -> list[int]:
    """All but the `number` layers of the lowest scores, in order."""
    return sorted(sorted(scores, key=lambda layer: (scores[layer], layer))[number:])


def _cosine(one: Tensor, other: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(one.double(), other.double(), dim=-1)


def _states(model: Any, layers: nn.ModuleList, batch: Batch) -> list[Tensor]:
    """What enters each layer, and what leaves the last, of the batch's tokens: L + 1 of [N, D]."""
    passing, last = _passing(model, layers, batch)
    return [state[batch.attention_mask] for state in (*passing, last)]


def _passing(model: Any, layers: nn.ModuleList, batch: Batch) -> tuple[list[Tensor], Tensor]:
    """What enters each layer, L of [B, T, D], and what leaves the last, before the final norm."""
    entered: list[Tensor] = []
    left: list[Tensor] = []

    def keep(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        entered.append(_first(arguments, keywords))
        left[:] = [output[0] if isinstance(output, tuple) else output]

    with ExitStack() as handles:
        for layer in layers:
            handles.callback(layer.register_forward_hook(keep, with_kwargs=True).remove)
        model.base_model(**batch.model_inputs())
    return entered, left[0]


@contextmanager
def _replaced(layers: nn.ModuleList, computed: Mapping[int, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Layers that compute something else of what enters them, which is cheap, inside."""
    with ExitStack() as undo:
        for number, function in computed.items():
            layer: Any = layers[number]
            before = layer.__dict__.get("forward")  # of a library that wraps modules
            layer.forward = _forward(function)
            undo.callback(_restore, layer, before)
        yield


def _forward(function: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda *arguments, **keywords: function(_first(arguments, keywords))


def _restore(layer: Any, forward: Any) -> None:
    if forward is None:
        del layer.forward
    else:
        layer.forward = forward


def _first(arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> Tensor:
    """The hidden states that a layer is called with."""
    return arguments[0] if arguments else keywords["hidden_states"]


def _handed_on(hidden: Tensor) -> Tensor:
    return hidden
