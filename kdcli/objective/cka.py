"""Centred kernel alignment: Kornblith et al. 2019, arXiv:1905.00414; unbiased: Nguyen et al. 2021, arXiv:2010.15327.

Letters: n targets of a sequence.
"""

from __future__ import annotations

from typing import ClassVar, Unpack

import torch
from torch import Tensor

from kdcli.api import Batch, Settings, StudentOutput, TeacherSignal, Unit
from kdcli.objective._layers import Layered, Layers, by_sequence, counts

LEAST = 4  # targets: the unbiased estimate divides by n - 3, and the biased one is near 1 for any two models before


class CKA(Layered):
    """1 - HSIC(X, Y) / sqrt(HSIC(X, X) HSIC(Y, Y)) per sequence, mean over pairs of layers; X [n, D_s] and Y [n, D_t]
    are the states of its targets, each column centred:

        biased:    HSIC = |X'Y|_F^2
        unbiased:  HSIC = <K, L> + sum(K) sum(L) / ((n - 1) (n - 2)) - 2 / (n - 2) sum(K L),  K = XX', L = YY' without
                   their diagonals (Song et al. 2012, eq. 5, up to the factor 1 / (n (n - 3)) that cancels)

    with linear kernels. The cost is O(n D^2), or O(n^2 D) where n is the smaller. The biased estimate is 1 for any two
    models where n is below their widths and grows with D / n: choose `unbiased` for short sequences and wide models;
    its value may exceed 1. No projector: the widths may differ. Sequences of fewer than four targets are no units.

    Departs from the papers, which compare two networks over a data set, in taking each sequence by itself.
    """

    unit: ClassVar[Unit] = Unit.SEQUENCE

    def __init__(self, *, layers: Layers = "uniform", unbiased: bool = False, **settings: Unpack[Settings]) -> None:
        super().__init__(layers=layers, **settings)
        self.unbiased = unbiased

    def units(self, batch: Batch) -> Tensor:
        return super().units(batch) & (counts(batch) >= LEAST)

    def forward(self, batch: Batch, student: StudentOutput, teacher: TeacherSignal) -> Tensor:
        ours, theirs = student.hidden_states, teacher.hidden_states
        assert ours is not None and theirs is not None, "it needs HIDDEN"
        pairs = self.pairs(len(ours) - 1, len(theirs) - 1)
        total = []
        for s, t in pairs:
            sequences = zip(by_sequence(batch, ours[s]), by_sequence(batch, theirs[t]), strict=True)
            total.append(torch.stack([self._sequence(x, y) for x, y in sequences]))
        return torch.stack(total).mean(0)

    def _sequence(self, x: Tensor, y: Tensor) -> Tensor:
        """States [n, D_s] and [n, D_t] -> ()."""
        if len(x) < LEAST:
            return x.sum() * 0.0
        x, y = (_scaled(states - states.mean(0)) for states in (x, y))
        own = self._hsic(x, x) * self._hsic(y, y)
        return 1 - self._hsic(x, y) / own.clamp(min=1e-12).sqrt()

    def _hsic(self, x: Tensor, y: Tensor) -> Tensor:
        """Of centred features, up to a factor of n alone."""
        n = len(x)
        wide = n < min(x.shape[1], y.shape[1])
        cross = ((x @ x.T) * (y @ y.T)).sum() if wide else (x.T @ y).square().sum()
        if not self.unbiased:
            return cross
        k, l = x.square().sum(1), y.square().sum(1)  # noqa: E741  # the diagonals; a row of K sums to -k, as X is centred
        return cross - k @ l + k.sum() * l.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k @ l)


def _scaled(states: Tensor) -> Tensor:
    """Of mean square one, which changes no alignment: products of four states would leave float32."""
    return states / states.square().mean().clamp(min=1e-30).sqrt()
