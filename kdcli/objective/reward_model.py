"""Reward model: Ouyang et al. 2022 (InstructGPT), arXiv:2203.02155, eq. 1."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from kdcli.api import Batch, ModelShape, Scope, StudentOutput, TeacherSignal
from kdcli.errors import ConfigError
from kdcli.objective._embedding import pooled, read_answer, some
from kdcli.objective._preference import Ranked, RankedSettings, Ranking


class RewardModel(Ranked):
    """-log sigmoid(r_better - r_worse) + center (r_better + r_worse)^2, r = <value, the answer's last hidden state>.

    The Bradley-Terry likelihood of the order; in a group of n answers the mean over its pairs, as in the paper, which
    divides by n choose 2. `value` [D] is learned with the student and saved with the run: both are the reward model.
    It begins normal with variance 1 / (D + 1) (Stiennon et al. 2020, arXiv:2009.01325). The state is that of the last
    position of the row that has read a supervised target. `center` keeps rewards around 0, which pairs leave open
    (arXiv:2312.09244, TRL's `center_rewards_coefficient`). Raises ConfigError if it is negative.
    """

    scope = Scope.STATES

    def __init__(self, *, center: float = 0.0, **settings: Unpack[RankedSettings]) -> None:
        super().__init__(**settings)
        if not center >= 0:
            raise ConfigError(f"RewardModel: center is {center}; set a factor of at least 0, such as 0.01")
        self.center = center
        self.value: nn.Parameter | None = None  # [D]

    def fit(self, student: ModelShape, teacher: ModelShape | None) -> None:
        self.value = nn.Parameter(torch.randn(student.width) / (student.width + 1) ** 0.5)

    def forward(self, batch: Batch, student: StudentOutput, teacher: TeacherSignal) -> Tensor:
        assert self.value is not None, "fit() makes the reward's parameters"
        states = pooled(batch, student.hidden, read_answer(batch), "last")  # [E, D]
        reward = states @ self.value.to(states.dtype)
        ranking = self.ranking(batch)
        better, worse = (reward[side] for side in ranking.pairs)
        return ranking.mean_pairs(-logsigmoid(better - worse) + self.center * (better + worse).square())

    def ranking(self, batch: Batch) -> Ranking:
        return Ranking.of(batch, self.answers, some(batch, read_answer(batch)))
