"""Attention probabilities of the teacher's layers: Jiao et al. 2020 (TinyBERT), arXiv:1909.10351, eq. 7."""

from __future__ import annotations

from typing import ClassVar, Literal, Unpack

import torch
from torch import Tensor

from kdcli.api import Batch, Need, StudentOutput, TeacherSignal, TokenSettings
from kdcli.objective._layers import Layered, Layers, spread, upcast, visible

TINY = torch.finfo(torch.float32).tiny


class Attention(Layered):
    """Distance of what a supervised position attends to, mean over heads and over pairs of layers (1 is the first).

        mse: 1/k sum_j (a_s - a_t)_j^2        kl: sum_j a_t log(a_t / a_s) - a_t + a_s

    over the k positions j of its sequence up to its own (of an encoder all of them); kl is the Kullback-Leibler
    divergence where rows sum to one, and stays non-negative where rounding or an attention sink keeps them from it.
    Where the models have different numbers of heads, each side's mean over its heads is compared. Both models must run
    eager attention. Logarithms are of 1e-38 at least, so that the value is finite where the student's window is
    narrower than the teacher's.

    Departs from TinyBERT: probabilities in place of scores (which the models do not hand out, and which a constant may
    shift), and the mean over keys is over those that the model can see. Dropout of the student's own
    probabilities is part of what is compared.
    """

    needs = Need.ATTENTION
    embedding: ClassVar[int] = 1

    def __init__(
        self, *, layers: Layers = "uniform", distance: Literal["mse", "kl"] = "mse", **settings: Unpack[TokenSettings]
    ) -> None:
        super().__init__(layers=layers, **settings)
        self.distance = distance

    def forward(self, batch: Batch, student: StudentOutput, teacher: TeacherSignal) -> Tensor:
        ours, theirs = student.attentions, teacher.attentions
        assert ours is not None and theirs is not None, "it needs ATTENTION"
        pairs = self.pairs(len(ours), len(theirs))
        values = []
        for row, asked in enumerate(batch.mask):
            seen = visible(batch, row, student.bidirectional)
            rows = [(ours[s - 1][row][:, asked], theirs[t - 1][row][:, asked]) for s, t in pairs]
            values.append(torch.stack([self._row(upcast(a), upcast(b), seen) for a, b in rows]).mean(0))
        return spread(torch.cat(values), batch.mask)

    def _row(self, student: Tensor, teacher: Tensor, seen: Tensor) -> Tensor:
        """Probabilities [H, n, T] of n queries, and what they may see [n, T] -> [n]."""
        if student.shape[0] != teacher.shape[0]:
            student, teacher = student.mean(0, keepdim=True), teacher.mean(0, keepdim=True)
        student, teacher = (torch.where(seen, one, 0.0) for one in (student, teacher))
        if self.distance == "mse":
            return (student - teacher).square().sum(-1).mean(0) / seen.sum(-1)
        ratio = teacher.clamp(min=TINY).log() - student.clamp(min=TINY).log()
        return (teacher * ratio - teacher + student).sum(-1).mean(0)
