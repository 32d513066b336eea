"""Temporally adaptive interpolated distillation: Shing et al. 2025 (TAID), arXiv:2501.16937."""

from __future__ import annotations

from typing import ClassVar, Unpack

from torch import Tensor

from kdcli.errors import ConfigError
from kdcli.objective._divergence import Divergence, DivergenceSettings
from kdcli.ops import divergence


class TAID(Divergence):
    """KL(p_t || q), p_t = softmax((1 - t) z + t y): a teacher that moves from the student (t = 0) to itself (t = 1).

    Logits are interpolated, and z is held fixed in p_t, as in the official code. `t` is the paper's t; the schedule
    `taid` moves it by how fast the loss falls, with the official `t_start` (`start`), `t_end` (`end`), `alpha` and
    `beta` (`momentum`). Departs from the official code in the value, not in the gradient: it reports the
    cross-entropy -sum p_t log q, which is H(p_t) more and not zero at p = q; t, which the schedule moves by the
    relative fall of the value, moves by that of the divergence. Of a top-k teacher the symbols of the common support
    are interpolated. Raises ConfigError if t is not in [0, 1].
    """

    stops_gradient = True
    falls: ClassVar[bool] = False  # p_t flees towards the teacher as fast as the student follows: the value may rise

    def __init__(self, *, t: float = 0.4, **settings: Unpack[DivergenceSettings]) -> None:
        super().__init__(**settings)
        if not 0 <= t <= 1:
            raise ConfigError(f"TAID: t is {t}; set the teacher's share of the interpolated logits, in [0, 1]")
        self.t = t

    def divergence(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return divergence.interpolated_kl(log_p, log_q, self.t)

    def divergence_gradient(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        return divergence.interpolated_kl_gradient(log_p, log_q, self.t)
