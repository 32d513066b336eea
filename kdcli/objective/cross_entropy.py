"""Cross-entropy with the data's own tokens (supervised fine-tuning); label smoothing: Szegedy et al. 2016."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor

from kdcli.api import Batch, Objective, StudentOutput, TeacherSignal, TokenSettings
from kdcli.errors import ConfigError


class CrossEntropy(Objective):
    """(1 - e) (-log q_y) + e mean_v(-log q_v), e = `label_smoothing` (arXiv:1512.00567, section 7, over all V).

    The same as torch's and transformers' `label_smoothing`; fairseq spreads e over the V - 1 other ids. Raises
    ConfigError if e is not in [0, 1).
    """

    def __init__(self, *, label_smoothing: float = 0.0, **settings: Unpack[TokenSettings]) -> None:
        super().__init__(**settings)
        if not 0 <= label_smoothing < 1:
            raise ConfigError(f"CrossEntropy: label_smoothing is {label_smoothing}; set a share in [0, 1)")
        self.label_smoothing = label_smoothing

    def forward(self, batch: Batch, student: StudentOutput, teacher: TeacherSignal) -> Tensor:
        log_q = student.log_q()
        value = -log_q.gather(-1, batch.targets.unsqueeze(-1)).squeeze(-1)
        if self.label_smoothing:
            value = (1 - self.label_smoothing) * value - self.label_smoothing * log_q.mean(-1)
        return value

    def closed_form(self, batch: Batch, student: StudentOutput, teacher: TeacherSignal) -> tuple[Tensor, Tensor]:
        return self.forward(batch, student, teacher), self.gradient(batch, student)

    def gradient(self, batch: Batch, student: StudentOutput) -> Tensor:
        """d / dz = q - (1 - e) onehot(y) - e / V, [1, C, V]."""
        gradient = student.log_q().exp()
        if self.label_smoothing:
            gradient.sub_(self.label_smoothing / gradient.shape[-1])
        share = torch.full_like(batch.targets, 1, dtype=gradient.dtype).mul_(self.label_smoothing - 1)
        return gradient.scatter_add_(-1, batch.targets.unsqueeze(-1), share.unsqueeze(-1))
