"""Kahneman-Tversky optimization: Ethayarajh et al. 2024 (KTO), arXiv:2402.01306."""

from __future__ import annotations

from typing import Literal, Unpack

import torch
from torch import Tensor

from kdcli.api import Batch, Settings, StudentOutput, TeacherSignal, Unit
from kdcli.errors import ConfigError
from kdcli.objective._preference import Answers, merit_of
from kdcli.objective._reference import Reference, Referenced


class KTO(Referenced):
    """w (1 - sigmoid(beta (r - z))) of a desirable answer, w (1 - sigmoid(beta (z - r))) of an undesirable one,
    r = log pi - log pi_ref of the answer, z a baseline held fixed. One number per answer: pairs are not needed.

    Desirable is a score above `threshold` (`answers: scores`), or the better answer of a preference pair (`pairs`).
    `desirable_weight` and `undesirable_weight` are the paper's lambda_D and lambda_U.

    Departs in z, the paper's estimate of KL(pi || pi_ref), for which HALOs and TRL take the mean of r over answers
    matched with other prompts of the micro-batch, so that the loss depends on how a step is cut. `baseline: none` is
    0; `group` is the mean of r over the other answers to the same prompt (of its `group`, or pair), at least 0, and 0
    where there is none. Either is exact under any cut. Raises ConfigError for a negative weight.
    """

    unit = Unit.SEQUENCE
    columns = frozenset({"score"})
    stops_gradient = True

    def __init__(
        self,
        *,
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
        threshold: float = 0.0,
        baseline: Literal["none", "group"] = "none",
        answers: Answers = "scores",
        beta: float = 0.1,
        reference: Reference = "student",
        length_normalize: bool = False,
        **settings: Unpack[Settings],
    ) -> None:
        super().__init__(answers=answers, beta=beta, reference=reference, length_normalize=length_normalize, **settings)
        for name, value in (("desirable_weight", desirable_weight), ("undesirable_weight", undesirable_weight)):
            if not value >= 0:
                raise ConfigError(f"KTO: {name} is {value}; set a factor of at least 0")
        if baseline not in ("none", "group"):
            raise ConfigError(f"KTO: baseline is {baseline!r}; set none or group")
        if answers == "scores":
            self.columns = frozenset({"score", "group"} if baseline == "group" else {"score"})
        self.desirable_weight = desirable_weight
        self.undesirable_weight = undesirable_weight
        self.threshold = threshold
        self.baseline: Literal["none", "group"] = baseline

    def units(self, batch: Batch) -> Tensor:
        return ~merit_of(batch, self.answers).isnan() & (batch.targets_by_sequence() > 0)

    def forward(self, batch: Batch, student: StudentOutput, teacher: TeacherSignal) -> Tensor:
        ratios = self.log_ratios(batch, student, teacher)
        merit = merit_of(batch, self.answers)
        desirable = merit == 0 if self.answers == "pairs" else merit > self.threshold
        sign = torch.where(desirable, 1.0, -1.0).to(ratios.dtype)
        weight = torch.where(desirable, self.desirable_weight, self.undesirable_weight).to(ratios.dtype)
        return weight * torch.sigmoid(-self.beta * sign * (ratios - self._baseline(batch, ratios.detach())))

    def _baseline(self, batch: Batch, ratios: Tensor) -> Tensor:
        """z of each answer, [E], without a graph."""
        if self.baseline == "none":
            return torch.zeros_like(ratios)
        groups = batch.groups()
        known = (batch.targets_by_sequence() > 0).to(ratios.dtype)
        others = (groups[:, None] == groups).to(ratios.dtype).fill_diagonal_(0) * known  # [E, E]
        return ((others @ ratios) / others.sum(1).clamp(min=1)).clamp(min=0)
