"""Hinge ranking of the teacher's likeliest ids: DistillKit; the ranking support vector machine of Joachims 2002."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor

from kdcli.errors import ConfigError
from kdcli.objective._ranking import Ranking, RankingSettings


class HingeRanking(Ranking):
    """max(0, margin - (z_k - z_l)), mean over pairs with p_k > p_l: the likelier id leads by `margin`, in logits.

    `margin` None takes the teacher's own lead log p_k - log p_l, as DistillKit's default takes p_k - p_l. Departs from
    DistillKit, which compares probabilities and not logits: there the gradient vanishes for a student that gives both
    ids next to nothing. Its mask breaks the loss where B differs from T; masks are not an objective's here. The slope
    at the margin is 0. Raises ConfigError for a negative margin.
    """

    def __init__(self, *, margin: float | None = 1.0, **settings: Unpack[RankingSettings]) -> None:
        super().__init__(**settings)
        if margin is not None and not margin >= 0:
            raise ConfigError(f"HingeRanking: margin is {margin}; set a lead of at least 0, or null for the teacher's")
        self.margin = margin

    def pair_loss(self, gap: Tensor, teacher_gap: Tensor) -> tuple[Tensor, Tensor]:
        lacking = (teacher_gap if self.margin is None else self.margin) - gap
        return torch.relu(lacking), -(lacking > 0).to(gap.dtype)
