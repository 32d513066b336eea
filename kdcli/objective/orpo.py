"""Odds-ratio preference optimization: Hong et al. 2024 (ORPO), arXiv:2403.07691."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor
from torch.nn.functional import logsigmoid

from kdcli.api import Batch, StudentOutput, TeacherSignal
from kdcli.errors import ConfigError
from kdcli.objective._preference import Pairwise, RankedSettings, answer_logprobs
from kdcli.ops.logprob import log_odds


class ORPO(Pairwise):
    """-l_better - alpha log sigmoid(log odds(l_better) - log odds(l_worse)), l the mean log-probability of a target.

    `alpha` is the paper's lambda, TRL's `beta` and the official code's `alpha`: .1 here as in the paper's experiments
    and TRL, 1.0 is that code's default. Needs no reference. Departs from the official code in number format (it casts
    the loss to bfloat16) and takes the likelihood of the answer alone, with each answer's own length. In a scored
    group the mean over its pairs. Raises ConfigError if alpha is negative.
    """

    def __init__(self, *, alpha: float = 0.1, **settings: Unpack[RankedSettings]) -> None:
        super().__init__(**settings)
        if not alpha >= 0:
            raise ConfigError(f"ORPO: alpha is {alpha}; set a factor of at least 0")
        self.alpha = alpha

    def pair_loss(
        self, batch: Batch, student: StudentOutput, teacher: TeacherSignal, better: Tensor, worse: Tensor
    ) -> Tensor:
        mean = answer_logprobs(batch, student.logprobs, 1.0)
        odds = log_odds(mean)
        return -mean[better] - self.alpha * logsigmoid(odds[better] - odds[worse])
