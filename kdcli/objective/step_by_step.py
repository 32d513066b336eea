"""Distilling step by step, labels and rationales as two tasks: Hsieh et al. 2023, arXiv:2305.02301."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

from torch import Tensor

from kdcli.api import Batch, Reduction, Settings, StudentOutput, TeacherSignal
from kdcli.errors import ConfigError
from kdcli.objective.cross_entropy import CrossEntropy


class StepByStep(CrossEntropy):
    """alpha L_label + (1 - alpha) L_rationale: cross-entropy with either task's text, each target's times 2 alpha in a
    label and times 2 (1 - alpha) in a rationale.

    Data: two examples per problem, told apart by the paper's task prefixes in their prompts ("[label]",
    "[rationale]") and by their domain: `rationale_domains` name the rationales', all others are labels. `alpha` is
    the official code's; the paper's lambda is (1 - alpha) / alpha, up to a factor of the whole.

    With as many rationales as labels and `reduction: sequence`, its default, the mean over all sequences of such
    values is alpha times the mean over labels plus (1 - alpha) times the mean over rationales; if one is more
    frequent it weighs more. Departs from the official code, which takes either task's mean over targets of a
    micro-batch, a number that depends on the cut of a step: here each example is one vote, and `reduction: token`
    would give rationales, which are longer, the more of them. Unlike it, a step may mix tasks in any way. Raises
    ConfigError if alpha is not in [0, 1] or no domain is a rationale's.
    """

    def __init__(
        self,
        *,
        alpha: float = 0.5,
        rationale_domains: Sequence[str] = ("rationale",),
        label_smoothing: float = 0.0,
        reduction: Reduction = "sequence",
        **settings: Unpack[Settings],
    ) -> None:
        super().__init__(label_smoothing=label_smoothing, reduction=reduction, **settings)
        if not 0 <= alpha <= 1:
            raise ConfigError(f"StepByStep: alpha is {alpha}; set the labels' share, in [0, 1]")
        if not rationale_domains:
            raise ConfigError("StepByStep: rationale_domains is empty; name the domains that hold rationales")
        self.alpha = alpha
        self.rationale_domains = tuple(rationale_domains)

    def forward(self, batch: Batch, student: StudentOutput, teacher: TeacherSignal) -> Tensor:
        value = super().forward(batch, student, teacher)
        return value * self._factor(batch, value)

    def closed_form(self, batch: Batch, student: StudentOutput, teacher: TeacherSignal) -> tuple[Tensor, Tensor]:
        gradient = self.gradient(batch, student)
        return self.forward(batch, student, teacher), gradient.mul_(self._factor(batch, gradient).unsqueeze(-1))

    def _factor(self, batch: Batch, like: Tensor) -> Tensor:
        """[B, T]: 2 alpha in labels, 2 (1 - alpha) in rationales."""
        factors = [2 * (1 - self.alpha if name in self.rationale_domains else self.alpha) for name in batch.domain]
        return like.new_tensor(factors)[batch.segment.clamp(min=0)]
