"""The interface of dual-space distillation: Zhang et al. 2024 (DSKD), arXiv:2406.17328."""

from __future__ import annotations

from dataclasses import replace
from typing import Unpack

import torch
from torch import Tensor, nn

from kdcli.api import ModelShape, Need, Scope
from kdcli.errors import ConfigError
from kdcli.objective._between import Between, between
from kdcli.objective._tempered import Tempered, TemperedSettings
from kdcli.ops.divergence import forward_kl
from kdcli.ops.head import Head


class DualSpace(Tempered):
    """Losses of two learned maps: `into_student` of the teacher's hidden states (the paper's P_t2s), and
    `into_teacher` of the student's (P_s2t), each with a bias, as in the official configuration."""

    needs = Need.LOGITS
    scope = Scope.STATES
    cross_tokenizer = True
    zero_at_teacher = False  # the maps are learned
    stops_gradient = True
    hard_part = True  # the cross-entropy has no temperature

    def __init__(self, *, divergence: Between = "forward_kl", **settings: Unpack[TemperedSettings]) -> None:
        super().__init__(**settings)
        self.divergence: Between = divergence

    def fit(self, student: ModelShape, teacher: ModelShape | None) -> None:
        if teacher is None:
            raise ConfigError(
                f"{type(self).__name__} compares hidden states, but this teacher has none; set teacher=hf"
            )
        self.into_student = nn.Linear(teacher.width, student.width)
        self.into_teacher = nn.Linear(student.width, teacher.width)

    def student_side(self, head: Head, hidden: Tensor, mapped: Tensor, targets: Tensor, *, right: bool) -> Tensor:
        """CE(W_s m, y) + D(W_s m, W_s h): the teacher's states mapped [C, D] beside the student's h [C, D] -> [C].

        The head is held fixed under the map and the map under D. `right`: D counts only where W_s m is largest at y.
        """
        fixed = replace(head, weight=head.weight.detach(), bias=None if head.bias is None else head.bias.detach())
        logits = fixed(mapped)
        surprise = -torch.log_softmax(logits, -1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        guide = logits.detach()
        log_p = torch.log_softmax(guide / self.temperature, -1)
        distance = between(self.divergence, log_p, torch.log_softmax(head(hidden) / self.temperature, -1))
        if right:
            distance = torch.where(guide.argmax(-1) == targets, distance, 0.0)
        return surprise + self.scale * distance

    def teacher_side(self, head: Head, hidden: Tensor, mapped: Tensor) -> Tensor:
        """KL(W_t h || W_t m): the teacher's states h [C, D'] beside the student's mapped [C, D'] -> [C]."""
        log_p, log_q = (torch.log_softmax(head(states) / self.temperature, -1) for states in (hidden, mapped))
        return self.scale * forward_kl(log_p, log_q)


def wide(hidden: Tensor) -> Tensor:
    """Hidden states in float32, which the maps are learned in; of float64, as they are."""
    return hidden if hidden.dtype == torch.float64 else hidden.float()
