"""The interface of objectives on what the layers computed: which layers, at which positions, of which sequence.

Layer i of L is the i-th block, counted from 1; 0 is the embedding. Letters: L_s and L_t layers of student and teacher.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Unpack

import torch
from torch import Tensor

from kdcli.api import Batch, ModelShape, Need, Objective, Scope, TokenSettings, Unit
from kdcli.errors import ConfigError

Layers = Literal["uniform", "last"] | Sequence[tuple[int, int]]


class Layered(Objective):
    """A comparison of pairs (student layer, teacher layer); the value is the mean over the pairs.

    `layers`: a list of pairs; `last` pairs the last with the last; `uniform` pairs layer i = 1 … L_s of the student
    with layer round(i L_t / L_s) of the teacher, halves up and never the embedding, so that the last ones meet
    (TinyBERT's map, arXiv:1909.10351, which has the embeddings too: add [0, 0] to a list). The last state is after
    the model's final norm, on both sides. Raises ConfigError, before training, for layers that do not exist.
    """

    needs = Need.HIDDEN
    scope = Scope.STATES
    embedding = 0  # the number of the lowest layer it can compare
    zero_at_teacher: bool = True

    def __init__(self, *, layers: Layers, **settings: Unpack[TokenSettings]) -> None:
        super().__init__(**settings)
        self.layers = layers
        if not isinstance(layers, str) and not layers:
            raise ConfigError(f"{type(self).__name__}: layers is empty; name pairs [student, teacher], uniform or last")

    def fit(self, student: ModelShape, teacher: ModelShape | None) -> None:
        if teacher is None:
            raise ConfigError(f"{type(self).__name__} compares layers, and this teacher has none; set teacher=hf")
        self.pairs(student.layers, teacher.layers)

    def pairs(self, student: int, teacher: int) -> list[tuple[int, int]]:
        """The layers to compare, of models with this many."""
        if self.layers == "last":
            return [(student, teacher)]
        if self.layers == "uniform":
            return [(i, max(1, (2 * i * teacher + student) // (2 * student))) for i in range(1, student + 1)]
        pairs = [(int(s), int(t)) for s, t in self.layers]  # pyright: ignore[reportArgumentType]
        for who, layers, last in (
            ("student", [s for s, _ in pairs], student),
            ("teacher", [t for _, t in pairs], teacher),
        ):
            wrong = [layer for layer in layers if not self.embedding <= layer <= last]
            if wrong:
                lowest = "0 is the embedding" if self.embedding == 0 else "1 is the first"
                raise ConfigError(
                    f"{type(self).__name__}: there is no {who} layer {wrong[0]}; it has {last} ({lowest}); "
                    "change the pairs [student, teacher] of layers"
                )
        return pairs

    def units(self, batch: Batch) -> Tensor:
        """Targets that the teacher scored too; no part of a preference pair's worse answer."""
        units = super().units(batch)
        if self.unit is Unit.TOKEN:
            return units if batch.teacher is None else units & (batch.teacher.position >= 0)
        return units if batch.rejected is None else units & ~batch.rejected


def upcast(values: Tensor) -> Tensor:
    """In float32 at least: sums over hidden units and tokens are lost in 16 bit."""
    return values if values.dtype == torch.float64 else values.float()


def rms(states: Tensor) -> Tensor:
    """Root of the mean square of [C, D], at least 1e-6: [C, 1]."""
    return states.square().mean(-1, keepdim=True).clamp(min=1e-12).sqrt()


def spread(values: Tensor, mask: Tensor) -> Tensor:
    """[N] of the targets where `mask` is True -> [B, T], 0 elsewhere."""
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)


def seen(batch: Batch) -> Tensor:
    """[B, T] bool: supervised targets that both models have a state for."""
    return batch.mask if batch.teacher is None else batch.mask & (batch.teacher.position >= 0)


def counts(batch: Batch) -> Tensor:
    """[E]: how many targets of each sequence both models have a state for."""
    return torch.bincount(batch.segment[seen(batch)], minlength=batch.num_sequences)


def by_sequence(batch: Batch, states: Tensor) -> list[Tensor]:
    """[B, T, D] -> of each sequence the float32 states of its targets in order, [n, D]."""
    mask = seen(batch)
    order = batch.segment[mask].argsort(stable=True)
    return list(upcast(states[mask][order]).split(counts(batch).tolist()))


def visible(batch: Batch, row: int, bidirectional: bool = False) -> Tensor:
    """[n, T] bool: what the n supervised positions of a row may attend to: themselves and what is before them in their
    sequence, prompt included; of an encoder all supervised positions of their sequence."""
    segment, position = batch.segment[row], torch.arange(batch.mask.shape[1], device=batch.mask.device)
    asked = batch.mask[row]
    seen = asked if bidirectional else position[asked, None] >= position
    return (segment[asked, None] == segment) & seen
