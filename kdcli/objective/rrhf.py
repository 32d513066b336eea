"""Rank responses to align with human feedback: Yuan et al. 2023 (RRHF), arXiv:2304.05302."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor

from kdcli.api import Batch, Settings, StudentOutput, TeacherSignal
from kdcli.errors import ConfigError
from kdcli.objective._preference import COLUMNS, Answers, Ranked, answer_logprobs


class RRHF(Ranked):
    """rank_weight sum_{j better than i} max(0, s_i - s_j) - l_best, s = log pi(answer) / length^length_penalty and
    l the mean log-probability of a target.

    `rank_weight` is the code's `rrhf_weight` (default 100 there; 1 is the paper's and the training scripts'),
    `length_penalty` its own. The ranking part is a sum over the group's pairs. The paper sums the best answer's
    log-probabilities, the official code takes their mean, as here; its lengths count padding, ours do not. Of several
    best answers the first is learned from. Raises ConfigError for a negative weight.
    """

    columns = COLUMNS["scores"]

    def __init__(
        self,
        *,
        rank_weight: float = 1.0,
        length_penalty: float = 1.0,
        answers: Answers = "scores",
        **settings: Unpack[Settings],
    ) -> None:
        super().__init__(answers=answers, **settings)
        if not rank_weight >= 0:
            raise ConfigError(f"RRHF: rank_weight is {rank_weight}; set a factor of at least 0")
        self.rank_weight = rank_weight
        self.length_penalty = length_penalty

    def forward(self, batch: Batch, student: StudentOutput, teacher: TeacherSignal) -> Tensor:
        ranking = self.ranking(batch)
        better, worse = ranking.pairs
        score = answer_logprobs(batch, student.logprobs, self.length_penalty)
        learned = answer_logprobs(batch, student.logprobs, 1.0)[ranking.best]
        ranked = ranking.sum_pairs((score[worse] - score[better]).relu())
        return (self.rank_weight * ranked - learned).where(ranking.pairs_by_group > 0, 0.0)
