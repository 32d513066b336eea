"""Contrastive distillation on teacher and student text: Ko et al. 2025 (DistiLLM-2), arXiv:2503.07067."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Unpack

import torch
from torch import Tensor

from kdcli.api import Batch, Reduction, Settings, StudentOutput, TeacherSignal
from kdcli.errors import ConfigError
from kdcli.objective._divergence import Divergence
from kdcli.objective._tempered import TemperatureScale, Tempered, Vocabulary
from kdcli.objective.skew_kl import SkewKL
from kdcli.objective.skew_reverse_kl import SkewReverseKL
from kdcli.ops.support import Missing


class DistiLLM2(Tempered):
    """(2 - beta) KL(p || alpha p + (1 - alpha) q) on targets of teacher text, beta KL(q || (1 - alpha) p + alpha q)
    with the mixture held fixed on targets of student text.

    Student text is what a preference row has as `rejected`; all other text counts as the teacher's. `alpha` and
    `beta` are the official code's, which averages over an answer's targets, then over pairs: `reduction: sequence`,
    the default here, averages over answers, of which a pair has two, so our value is half of that code's.

    Departs from the paper in both adaptive schedules, which the official code has switched off or dead: beta rises
    from 1 to 1.5 by a schedule on `beta`; alpha per answer needs the whole answer's probabilities and is left out.
    Raises ConfigError if alpha is not in [0, 1) or beta not in [0, 2].
    """

    columns = frozenset({"rejected"})
    f_divergence = True
    stops_gradient = True

    def __init__(
        self,
        *,
        alpha: float = 0.1,
        beta: float = 1.0,
        reduction: Reduction = "sequence",
        temperature: float = 1.0,
        temperature_scale: TemperatureScale = "none",
        vocabulary: Vocabulary = "shared",
        missing: Missing = "tail",
        **settings: Unpack[Settings],
    ) -> None:
        super().__init__(
            temperature=temperature,
            temperature_scale=temperature_scale,
            vocabulary=vocabulary,
            reduction=reduction,
            **settings,
        )
        if not 0 <= alpha < 1:
            raise ConfigError(f"DistiLLM2: alpha is {alpha}; set a share of the mixtures, in [0, 1)")
        if not 0 <= beta <= 2:
            raise ConfigError(f"DistiLLM2: beta is {beta}; set the weight of student text, in [0, 2]")
        self.alpha = alpha
        self.beta = beta
        self.missing: Missing = missing

    def units(self, batch: Batch) -> Tensor:
        return torch.ones_like(batch.mask)  # the worse answers too

    def forward(self, batch: Batch, student: StudentOutput, teacher: TeacherSignal) -> Tensor:
        parts = [
            (index, weight * part(batch, *_at(index, student, teacher)))
            for index, weight, part in self._parts(batch, student)
        ]
        return _joined([(index, value[0]) for index, value in parts])[None]

    def closed_form(self, batch: Batch, student: StudentOutput, teacher: TeacherSignal) -> tuple[Tensor, Tensor]:
        values, gradients = [], []
        for index, weight, part in self._parts(batch, student):
            closed = part.closed_form(batch, *_at(index, student, teacher))
            assert closed is not None, "both divergences have a closed form"
            values.append((index, weight * closed[0][0]))
            gradients.append((index, closed[1][0].mul_(weight)))
        return _joined(values)[None], _joined(gradients)[None]

    def _parts(self, batch: Batch, student: StudentOutput) -> Iterator[tuple[Tensor | None, float, Divergence]]:
        """Which of the chunk's targets (None: all), their weight and their divergence."""
        shared = {name: getattr(self, name) for name in ("alpha", "temperature", "temperature_scale", "missing")}
        teacher_text = (None, 2 - self.beta, SkewKL(**shared))
        if batch.rejected is None:
            yield teacher_text
            return
        rejected = batch.rejected[batch.segment[0].clamp(min=0)]  # [C]
        student_text = (None, self.beta, SkewReverseKL(detach_mixture=True, **shared))
        if not bool(rejected.any()):
            yield teacher_text
        elif bool(rejected.all()):
            yield student_text
        else:
            yield (~rejected).nonzero()[:, 0], *teacher_text[1:]
            yield rejected.nonzero()[:, 0], *student_text[1:]


def _at(index: Tensor | None, student: StudentOutput, teacher: TeacherSignal) -> tuple[StudentOutput, TeacherSignal]:
    """The targets `index` of a chunk, [1, C, ...] -> [1, len(index), ...]."""
    if index is None:
        return student, teacher
    assert student.logits is not None, "logits exist only inside a chunk"
    topk = teacher.topk
    part = TeacherSignal(
        logits=None if teacher.logits is None else teacher.logits[:, index],
        topk=None if topk is None else replace(topk, ids=topk.ids[:, index], logprobs=topk.logprobs[:, index]),
    )
    return StudentOutput(logits=student.logits[:, index]), part


def _joined(parts: list[tuple[Tensor | None, Tensor]]) -> Tensor:
    """Rows of each part [n, ...] at their index, as one tensor [C, ...]."""
    if len(parts) == 1:
        return parts[0][1]
    order = torch.cat([index for index, _ in parts if index is not None]).argsort()
    return torch.cat([values for _, values in parts])[order]
