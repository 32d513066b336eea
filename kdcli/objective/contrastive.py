"""Contrastive loss of embeddings (InfoNCE, arXiv:1807.03748), with hard negatives as E5-Mistral, arXiv:2401.00368."""

from __future__ import annotations

from typing import Literal, Unpack

import torch
from torch import Tensor
from torch.nn.functional import normalize

from kdcli.api import Batch, Scope, Settings, StudentOutput, TeacherSignal
from kdcli.errors import ConfigError
from kdcli.objective._embedding import Pooling, pooled, read_answer, read_prompt, read_text, some
from kdcli.objective._preference import Ranked, Ranking


class Contrastive(Ranked):
    """-log [exp(cos(a, b) / temperature) / sum_c exp(cos(a, c) / temperature)], over c = the group's best candidate b
    and those that are worse than it: the student becomes an embedding model.

    `anchor: prompt` takes the prompt's embedding as a and the answers' as candidates: prompt = query, chosen or best
    scored answer = what should be found, the others = hard negatives. An answer's states have read its prompt.
    `anchor: first` is a bi-encoder: the first sequence of a scored group is the query, whatever its score, and each
    other is a candidate that is read alone. An embedding is the mean of the student's last hidden states over the
    positions of the text (`pooling: mean`), or the last of them, as in E5-Mistral (`last`).

    Departs from the papers in its negatives: those of the same group only and not the rest of the batch, so that the
    loss does not depend on how a step is cut. Raises ConfigError if the temperature is not positive.
    """

    scope = Scope.STATES

    def __init__(
        self,
        *,
        anchor: Literal["prompt", "first"] = "prompt",
        pooling: Pooling = "mean",
        temperature: float = 0.02,
        **settings: Unpack[Settings],
    ) -> None:
        super().__init__(**settings)
        if not temperature > 0:
            raise ConfigError(f"Contrastive: temperature is {temperature}; set a number above 0, such as 0.02")
        if anchor not in ("prompt", "first"):
            raise ConfigError(f"Contrastive: anchor is {anchor!r}; set prompt or first")
        if pooling not in ("mean", "last"):
            raise ConfigError(f"Contrastive: pooling is {pooling!r}; set mean or last")
        self.anchor: Literal["prompt", "first"] = anchor
        self.pooling: Pooling = pooling
        self.temperature = temperature

    def units(self, batch: Batch) -> Tensor:
        return self._ranking(batch).pairs_by_group > 0

    def forward(self, batch: Batch, student: StudentOutput, teacher: TeacherSignal) -> Tensor:
        ranking = self._ranking(batch)
        candidates = self._embedded(batch, student, self._candidate_positions(batch))  # [E, D]
        if self.anchor == "first":
            anchors = candidates[_first(batch)[batch.groups()]]
        else:
            anchors = self._embedded(batch, student, read_prompt(batch))
        best = ranking.best[ranking.group]  # [E]
        similarity = (anchors[best] * candidates).sum(-1) / self.temperature  # [E] of each answer with its group's
        beaten = ranking.beats[ranking.best]  # [G, E]
        competing = similarity.expand_as(beaten).masked_fill(~beaten, float("-inf"))
        own = similarity[ranking.best]  # [G]
        lost = torch.logsumexp(torch.cat([own[:, None], competing], dim=1), dim=1) - own
        return lost.where(ranking.pairs_by_group > 0, 0.0)

    def _embedded(self, batch: Batch, student: StudentOutput, positions: Tensor) -> Tensor:
        return normalize(pooled(batch, student.hidden, positions, self.pooling), dim=-1)

    def _candidate_positions(self, batch: Batch) -> Tensor:
        return read_text(batch) if self.anchor == "first" else read_answer(batch)

    def _ranking(self, batch: Batch) -> Ranking:
        usable = some(batch, self._candidate_positions(batch))
        if self.anchor == "first":
            usable[_first(batch)] = False  # the query is no candidate
        return Ranking.of(batch, usable)


def _first(batch: Batch) -> Tensor:
    """[G]: the first sequence of each group."""
    groups = batch.groups()
    index = torch.arange(len(groups), device=groups.device)
    return index.new_full((int(groups.max()) + 1,), len(groups)).scatter_reduce(0, groups, index, "amin")
