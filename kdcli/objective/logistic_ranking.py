"""Logistic ranking of the teacher's likeliest ids: DistillKit; the pairwise loss of RankNet, Burges et al. 2005."""

from __future__ import annotations

import torch
from torch import Tensor

from kdcli.objective._ranking import Ranking


class LogisticRanking(Ranking):
    """log(1 + exp(-(z_k - z_l))), mean over pairs with p_k > p_l: a hinge without a corner, that always pulls apart.

    The same as DistillKit's `logistic_ranking`, whose mask breaks the loss where B differs from T; masks are not an
    objective's here.
    """

    def pair_loss(self, gap: Tensor, teacher_gap: Tensor) -> tuple[Tensor, Tensor]:
        return -torch.nn.functional.logsigmoid(gap), -torch.sigmoid(-gap)
