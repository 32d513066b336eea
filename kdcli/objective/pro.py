"""Preference ranking optimization: Song et al. 2023 (PRO), arXiv:2306.17492."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor

from kdcli.api import Batch, Settings, StudentOutput, TeacherSignal
from kdcli.errors import ConfigError
from kdcli.objective._preference import COLUMNS, Answers, Ranked, answer_logprobs


class PRO(Ranked):
    """sum_k -log [exp(l_k m_k) / (exp(l_k m_k) + sum_{i worse than k} exp(l_i d_ki))] - sft_weight (n - 1)^2 log
    pi(best), l the mean log-probability of a target, d_ki the difference of the scores of k and i, m_k its maximum.

    d and m are the paper's 1 / T_k^i and 1 / T_k^k; `score_temperature: false` sets both to 1, which with
    `sft_weight` 0 is ListMLE (Xia et al. 2008), the Plackett-Luce likelihood of the order. (n - 1)^2 with n answers
    and a sum of log-probabilities follow the official code, whose `sft_weight` is .05 as the paper's beta. A
    preference pair has d = m = 1. Departs where scores are equal: such answers do not compete with each other, and in
    log space, without the code's 1e-10. Raises ConfigError for a negative weight.
    """

    columns = COLUMNS["scores"]

    def __init__(
        self,
        *,
        sft_weight: float = 0.05,
        score_temperature: bool = True,
        answers: Answers = "scores",
        **settings: Unpack[Settings],
    ) -> None:
        super().__init__(answers=answers, **settings)
        if not sft_weight >= 0:
            raise ConfigError(f"PRO: sft_weight is {sft_weight}; set a factor of at least 0")
        self.sft_weight = sft_weight
        self.score_temperature = score_temperature

    def forward(self, batch: Batch, student: StudentOutput, teacher: TeacherSignal) -> Tensor:
        ranking = self.ranking(batch)
        beats, mean = ranking.beats, answer_logprobs(batch, student.logprobs, 1.0)
        gap = (ranking.merit[:, None] - ranking.merit).where(beats, 0.0).to(mean.dtype)  # [E, E]
        if not self.score_temperature:
            gap = beats.to(mean.dtype)
        own = mean * gap.amax(1)  # [E]
        others = (mean * gap).masked_fill(~beats, float("-inf"))  # [E, E] of k, i
        lost = torch.logsumexp(torch.cat([own[:, None], others], dim=1), dim=1) - own
        size = ranking.sum_answers(ranking.ranked.to(mean.dtype))  # [G]
        learned = self.sft_weight * (size - 1).square() * answer_logprobs(batch, student.logprobs)[ranking.best]
        return (ranking.sum_answers(lost) - learned).where(ranking.pairs_by_group > 0, 0.0)
