"""Listwise KL of scored answers: Cao et al. 2007 (ListNet's top-one probabilities); of a teacher's, as in LLM-R."""

from __future__ import annotations

from typing import Literal, Unpack

import torch
from torch import Tensor

from kdcli.api import Batch, Need, Settings, StudentOutput, TeacherSignal
from kdcli.errors import ConfigError
from kdcli.objective._preference import COLUMNS, Answers, Ranked, Ranking, answer_logprobs


class Listwise(Ranked):
    """KL(p || q) over the answers of a group: p = softmax(score / temperature), q = softmax(s / student_temperature),
    s = log pi(answer) / length^length_penalty.

    `scores: data` takes the data's scores (0 and -1 for a preference pair); `teacher` takes the teacher's own s, so
    that the student learns how the teacher ranks the answers of a group, and is zero where they agree (LLM-R,
    arXiv:2307.07164, distils a ranking so into a retriever). ListNet's loss is the cross-entropy, which differs by
    the entropy of p: the same gradient. ListMLE is objective pro without its temperatures. Answers of equal score
    count, with equal p.
    Raises ConfigError if a temperature is not positive.
    """

    columns = COLUMNS["scores"]

    def __init__(
        self,
        *,
        scores: Literal["data", "teacher"] = "data",
        temperature: float = 1.0,
        student_temperature: float = 1.0,
        length_penalty: float = 1.0,
        answers: Answers = "scores",
        **settings: Unpack[Settings],
    ) -> None:
        super().__init__(answers=answers, **settings)
        for name, value in (("temperature", temperature), ("student_temperature", student_temperature)):
            if not value > 0:
                raise ConfigError(f"Listwise: {name} is {value}; set a number above 0")
        if scores not in ("data", "teacher"):
            raise ConfigError(f"Listwise: scores is {scores!r}; set data or teacher")
        self.scores: Literal["data", "teacher"] = scores
        self.temperature = temperature
        self.student_temperature = student_temperature
        self.length_penalty = length_penalty
        self.needs = Need.LOGPROBS if scores == "teacher" else Need.NOTHING

    @property
    def zero_at_teacher(self) -> bool:
        """Whether value and gradient vanish when the student equals the teacher."""
        return self.scores == "teacher" and self.temperature == self.student_temperature

    def units(self, batch: Batch) -> Tensor:
        ranking = self.ranking(batch)
        return ranking.sum_answers(ranking.ranked.long()) > 1

    def forward(self, batch: Batch, student: StudentOutput, teacher: TeacherSignal) -> Tensor:
        ranking = self.ranking(batch)
        own = answer_logprobs(batch, student.logprobs, self.length_penalty)
        theirs = answer_logprobs(batch, teacher.logprobs, self.length_penalty) if self.scores == "teacher" else None
        wanted = ranking.merit.where(ranking.ranked, 0.0).to(own.dtype) if theirs is None else theirs
        log_p = _log_softmax(wanted / self.temperature, ranking)
        log_q = _log_softmax(own / self.student_temperature, ranking)
        return ranking.sum_answers((log_p.exp() * (log_p - log_q)).where(ranking.ranked, 0.0))


def _log_softmax(values: Tensor, ranking: Ranking) -> Tensor:
    """Within each group, over its ranked answers: [E] -> [E]; 0 for the others."""
    itself = torch.eye(len(values), dtype=torch.bool, device=values.device)
    members = values.expand(len(values), -1).masked_fill(~(ranking.together | itself), float("-inf"))
    return values - torch.logsumexp(members, dim=1)
