"""Contrastive loss of embeddings (InfoNCE, arXiv:1807.03748), with hard negatives as E5-Mistral, arXiv:2401.00368."""

from __future__ import annotations

from typing import Literal, Unpack

import torch
from torch import Tensor
from torch.nn.functional import normalize

from kdcli.api import Batch, Scope, StudentOutput, TeacherSignal
from kdcli.errors import ConfigError
from kdcli.objective._embedding import Pooling, pooled, read_answer, read_prompt, read_text, some
from kdcli.objective._preference import Ranked, RankedSettings, Ranking


class Contrastive(Ranked):
    """-log [exp(cos(a, b) / temperature) / sum_c exp(cos(a, c) / temperature)], over c = the group's best candidate b
    and those that are worse than it: the student becomes an embedding model.

    `anchor: prompt` takes the prompt's embedding as a and the answers' as candidates: prompt = query, chosen or best
    scored answer = what should be found, the others = hard negatives. An answer's states have read its prompt.
    `anchor: top` is a bi-encoder, for `answers: scores`: a group's row of the highest score is the query, the next is
    what should be found, and the rows below are negatives, each read alone (score 2, 1, 0 ...). An embedding is the
    mean of the student's last hidden states over the positions of the text (`pooling: mean`), or the last of them, as
    in E5-Mistral (`last`).

    Departs from the papers in its negatives: those of the same group only and not the rest of the batch, so that the
    loss does not depend on how a step is cut. Raises ConfigError if the temperature is not positive, or for
    `anchor: top` with pairs.
    """

    scope = Scope.STATES
    reads_prompt = True  # states of positions that no target is supervised at

    def __init__(
        self,
        *,
        anchor: Literal["prompt", "top"] = "prompt",
        pooling: Pooling = "mean",
        temperature: float = 0.02,
        **settings: Unpack[RankedSettings],
    ) -> None:
        super().__init__(**settings)
        if not temperature > 0:
            raise ConfigError(f"Contrastive: temperature is {temperature}; set a number above 0, such as 0.02")
        if anchor not in ("prompt", "top"):
            raise ConfigError(f"Contrastive: anchor is {anchor!r}; set prompt or top")
        if anchor == "top" and self.answers == "pairs":
            raise ConfigError("Contrastive: anchor=top compares scored rows; set answers=scores, or anchor=prompt")
        if pooling not in ("mean", "last"):
            raise ConfigError(f"Contrastive: pooling is {pooling!r}; set mean or last")
        self.anchor: Literal["prompt", "top"] = anchor
        self.pooling: Pooling = pooling
        self.temperature = temperature

    def ranking(self, batch: Batch) -> Ranking:
        everything = self._all(batch)
        if self.anchor == "prompt":
            return everything
        usable = everything.usable.clone()
        usable[everything.best[everything.pairs_by_group > 0]] = False  # the query is no candidate
        return Ranking.of(batch, self.answers, usable)

    def forward(self, batch: Batch, student: StudentOutput, teacher: TeacherSignal) -> Tensor:
        ranking = self.ranking(batch)
        candidates = self._embedded(batch, student, self._positions(batch))  # [E, D]
        if self.anchor == "prompt":
            queries = self._embedded(batch, student, read_prompt(batch))[ranking.best]  # [G, D]
        else:
            queries = candidates[self._all(batch).best]
        similarity = (queries[ranking.group] * candidates).sum(-1) / self.temperature  # [E]
        beaten = ranking.beats[ranking.best]  # [G, E]
        competing = similarity.expand_as(beaten).masked_fill(~beaten, float("-inf"))
        own = similarity[ranking.best]  # [G]
        lost = torch.logsumexp(torch.cat([own[:, None], competing], dim=1), dim=1) - own
        return lost.where(ranking.pairs_by_group > 0, 0.0)

    def _all(self, batch: Batch) -> Ranking:
        """All texts of a group, a query among them."""
        return Ranking.of(batch, self.answers, some(batch, self._positions(batch)))

    def _embedded(self, batch: Batch, student: StudentOutput, positions: Tensor) -> Tensor:
        return normalize(pooled(batch, student.hidden, positions, self.pooling), dim=-1)

    def _positions(self, batch: Batch) -> Tensor:
        return read_answer(batch) if self.anchor == "prompt" else read_text(batch)
