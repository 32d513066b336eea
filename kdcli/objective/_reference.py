"""The interface of losses that hold the student against a reference model: the log-ratio of a whole answer."""

from __future__ import annotations

from typing import Literal, Unpack

from torch import Tensor

from kdcli.api import Batch, Need, StudentOutput, TeacherSignal
from kdcli.errors import ConfigError
from kdcli.objective._preference import Ranked, RankedSettings, answer_logprobs

Reference = Literal["student", "teacher", "none"]

_NEEDS = {"student": Need.REFERENCE, "teacher": Need.LOGPROBS, "none": Need.NOTHING}


class ReferenceSettings(RankedSettings, total=False):
    """Settings of every loss with a reference."""

    beta: float
    reference: Reference
    length_normalize: bool


class Referenced(Ranked):
    """A loss of r = log pi(answer) - log pi_ref(answer).

    `reference`: `student`, the student as it began (the papers' choice); `teacher`, which makes the loss one of
    distillation, as it keeps the student near the teacher; `none`, r = log pi. `beta` says how much r counts.
    `length_normalize` takes the mean over the answer's targets in place of the sum. Raises ConfigError
    if beta is not positive.
    """

    needs = Need.REFERENCE

    def __init__(
        self,
        *,
        beta: float = 0.1,
        reference: Reference = "student",
        length_normalize: bool = False,
        **settings: Unpack[RankedSettings],
    ) -> None:
        super().__init__(**settings)
        if not beta > 0:
            raise ConfigError(f"{type(self).__name__}: beta is {beta}; set a number above 0, such as 0.1")
        if reference not in _NEEDS:
            raise ConfigError(f"{type(self).__name__}: reference is {reference!r}; set student, teacher or none")
        self.beta = beta
        self.reference: Reference = reference
        self.length_normalize = length_normalize
        self.needs = _NEEDS[reference]

    def log_ratios(self, batch: Batch, student: StudentOutput, teacher: TeacherSignal) -> Tensor:
        """r of each answer, [E]."""
        power = 1.0 if self.length_normalize else 0.0
        log_pi = answer_logprobs(batch, student.logprobs, power)
        if self.reference == "none":
            return log_pi
        own = teacher.reference_logprobs if self.reference == "student" else teacher.logprobs
        return log_pi - answer_logprobs(batch, own, power)
