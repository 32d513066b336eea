"""The interface of token objectives that compare two distributions: temperature, T squared and support, once."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from kdcli.api import Batch, Need, Objective, StudentOutput, TeacherSignal
from kdcli.errors import ConfigError
from kdcli.ops.support import on_support

TemperatureScale = Literal["none", "t2"]


class Divergence(Objective):
    """D(p, q) per target with p = softmax(y / T), q = softmax(z / T), on the vocabulary or a sparse support.

    `temperature_scale`: `t2` multiplies value and gradient by T squared (Hinton et al. 2015, so that the gradient's
    size does not depend on T); `none` leaves both alone. Raises ConfigError if the temperature is not positive.
    """

    needs = Need.DISTRIBUTION

    def __init__(
        self,
        *,
        weight: float = 1.0,
        domains: Sequence[str] = (),
        temperature: float = 1.0,
        temperature_scale: TemperatureScale = "none",
    ) -> None:
        super().__init__(weight=weight, domains=domains)
        if not temperature > 0:
            raise ConfigError(f"{type(self).__name__}: temperature is {temperature}; set a number above 0")
        self.temperature = temperature
        self.scale = temperature**2 if temperature_scale == "t2" else 1.0

    @abstractmethod
    def divergence(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """Log-probabilities [..., S] of teacher and student -> nats [...]."""

    def divergence_gradient(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor] | None:
        """Value [...] and its gradient with respect to z where log_q = log_softmax(z), [..., S]; None: autograd."""
        return None

    def forward(self, batch: Batch, student: StudentOutput, teacher: TeacherSignal) -> Tensor:
        log_q = student.log_q(self.temperature)
        if teacher.topk is None:
            pair = on_support(log_q, log_p=teacher.log_p(self.temperature))
        else:
            if teacher.topk.temperature != self.temperature:
                raise ConfigError(
                    f"{type(self).__name__}: temperature is {self.temperature} but the teacher's log-probabilities "
                    f"were stored at {teacher.topk.temperature}; set the same, or store them again"
                )
            pair = on_support(log_q, ids=teacher.topk.ids, logprobs=teacher.topk.logprobs)
        return self.scale * self.divergence(*pair)

    def closed_form(self, batch: Batch, student: StudentOutput, teacher: TeacherSignal) -> tuple[Tensor, Tensor] | None:
        log_p = teacher.log_p(self.temperature)
        if log_p is None:
            return None
        result = self.divergence_gradient(*on_support(student.log_q(self.temperature), log_p=log_p))
        if result is None:
            return None
        value, gradient = result
        if self.scale == 1.0 and self.temperature == 1.0:
            return value, gradient
        return value * self.scale, gradient.mul_(self.scale / self.temperature)
