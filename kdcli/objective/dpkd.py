"""Direct preference knowledge distillation: Li et al. 2024 (DPKD), arXiv:2406.19774."""

from __future__ import annotations

from typing import Literal, Unpack

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from kdcli.api import Batch, Need, StudentOutput, TeacherSignal
from kdcli.errors import ConfigError
from kdcli.objective._tempered import Tempered, TemperedSettings

Variant = Literal["dpo", "ipo", "dpop"]


class DPKD(Tempered):
    """DPO of one token: better is c = argmax p, worse is r = argmax q, and the teacher is the reference:

        h = (log q_c - log q_r) - (log p_c - log p_r)
        dpo   -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h), e = `label_smoothing`
        ipo   (h - 1 / (2 beta))^2
        dpop  as dpo, + penalty max(0, log p_c - log q_c)

    The official code's `dpo_beta`, `DPOP_lambda` and `label_smoothing` are beta, `penalty` and e; it computes the
    log-probabilities in bfloat16, this in float32. Where both models put the same token first, h is 0: dpo has its
    constant log 2 and no gradient there, so that its value does not fall to 0. The penalty stands outside of the
    sigmoid as in the official code (DPO-positive, arXiv:2402.13228, has it inside). Needs the whole vocabulary. Raises
    ConfigError for a teacher that gives top-k only, or for settings out of range.
    """

    needs = Need.LOGITS
    zero_at_teacher = False

    def __init__(
        self,
        *,
        variant: Variant = "dpo",
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        penalty: float = 50.0,
        **settings: Unpack[TemperedSettings],
    ) -> None:
        super().__init__(**settings)
        if variant not in ("dpo", "ipo", "dpop"):
            raise ConfigError(f"DPKD: variant is {variant!r}; set dpo, ipo or dpop")
        if not beta > 0:
            raise ConfigError(f"DPKD: beta is {beta}; set a number above 0, such as 0.1")
        if not 0 <= label_smoothing < 1:
            raise ConfigError(f"DPKD: label_smoothing is {label_smoothing}; set a share in [0, 1)")
        if not penalty >= 0:
            raise ConfigError(f"DPKD: penalty is {penalty}; set a factor of at least 0")
        self.variant: Variant = variant
        self.beta = beta
        self.label_smoothing = label_smoothing
        self.penalty = penalty

    def forward(self, batch: Batch, student: StudentOutput, teacher: TeacherSignal) -> Tensor:
        log_p, log_q = self.dense_log_p(teacher), student.log_q(self.temperature)
        chosen, rejected = log_p.argmax(-1), log_q.argmax(-1)
        gap = (_at(log_q, chosen) - _at(log_q, rejected)) - (_at(log_p, chosen) - _at(log_p, rejected))
        value = self._of_gap(gap)
        if self.variant == "dpop":
            value = value + self.penalty * (_at(log_p, chosen) - _at(log_q, chosen)).relu()
        return self.scale * value

    def closed_form(self, batch: Batch, student: StudentOutput, teacher: TeacherSignal) -> tuple[Tensor, Tensor]:
        """d h / dz = onehot(c) - onehot(r), and d(-log q_c) / dz = q - onehot(c) where the penalty works."""
        log_p, log_q = self.dense_log_p(teacher), student.log_q(self.temperature)
        chosen, rejected = log_p.argmax(-1, keepdim=True), log_q.argmax(-1, keepdim=True)
        at_p, at_q = log_p.gather(-1, chosen), log_q.gather(-1, chosen)  # [1, C, 1]
        gap = (at_q - log_q.gather(-1, rejected)) - (at_p - log_p.gather(-1, rejected))
        value, slope = self._of_gap(gap), self._slope(gap)
        gradient = torch.zeros_like(log_q)
        if self.variant == "dpop":
            works = (at_p > at_q).to(log_q.dtype) * self.penalty
            value = value + works * (at_p - at_q)
            gradient = torch.exp(log_q, out=gradient).mul_(works).scatter_add_(-1, chosen, -works)
        gradient.scatter_add_(-1, chosen, slope).scatter_add_(-1, rejected, -slope)
        return self.scaled(value.squeeze(-1), gradient)

    def _of_gap(self, gap: Tensor) -> Tensor:
        if self.variant == "ipo":
            return (gap - 1 / (2 * self.beta)).square()
        scaled, e = self.beta * gap, self.label_smoothing
        return -(1 - e) * logsigmoid(scaled) - e * logsigmoid(-scaled)

    def _slope(self, gap: Tensor) -> Tensor:
        """d `_of_gap` / d gap."""
        if self.variant == "ipo":
            return 2 * (gap - 1 / (2 * self.beta))
        scaled, e = self.beta * gap, self.label_smoothing
        return self.beta * (e * torch.sigmoid(scaled) - (1 - e) * torch.sigmoid(-scaled))


def _at(values: Tensor, ids: Tensor) -> Tensor:
    """values [..., V] at ids [...] -> [...]."""
    return values.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
