"""Minimum edit distance alignment: Wan et al. 2024 (FuseLLM), arXiv:2401.10491, as a loss of logits."""

from __future__ import annotations

from typing import Any, Literal, Unpack

import torch
from torch import Tensor

from kdcli.api import Batch, Need, Scope, StudentOutput, TeacherSignal
from kdcli.errors import ConfigError
from kdcli.objective._spans import heads, spans_of
from kdcli.objective._tempered import Tempered, TemperedSettings
from kdcli.ops.chunked import chunk_size, map_chunks
from kdcli.ops.divergence import forward_kl
from kdcli.text.vocabulary import nearest_ids


class MinED(Tempered):
    """KL(p' || q), p' the teacher's distribution written in the student's ids; -log q(y) where p' is not known.

    p' is known where one token of the student's and one of the teacher's stand for the same bytes after the same
    text. There, each of the teacher's ids passes its probability on to the student's id for the same bytes, or with
    `near` for text one edit away; ids without such a one are left out, and p' sums to one over the rest. Elsewhere
    `unmatched: gold` takes the data's token for certain, as FuseLLM and DSKD's `min_edit_dis_kld` do, and `skip` has
    no number.

    Departs from both: texts are aligned by bytes and not by the edit distance of tokens, which may pair tokens of
    different places; of several ids that pass on to one the probabilities are added, and not the largest logit taken;
    only neighbours at edit distance 1 count, because farther ones stand for something else; temperature softens the
    student beside a certain token, but not that token. Raises ConfigError if no ids match, or for a teacher that gives
    top-k only.
    """

    needs = Need.LOGITS
    scope = Scope.STATES
    cross_tokenizer = True

    def __init__(
        self, *, unmatched: Literal["gold", "skip"] = "gold", near: bool = True, **settings: Unpack[TemperedSettings]
    ) -> None:
        super().__init__(**settings)
        self.unmatched = unmatched
        self.near = near
        self.nearest: Tensor | None = None  # [V'] the student's id per id of the teacher's, -1 none; from `match` on

    def match(self, student: Any, teacher: Any) -> None:
        self.nearest = torch.tensor(nearest_ids(student, teacher, near=self.near), dtype=torch.int64)
        if not bool((self.nearest >= 0).any()):
            raise ConfigError(
                "MinED: no token of the teacher's vocabulary is in the student's; choose uld, which needs none"
            )

    def units(self, batch: Batch) -> Tensor:
        known = super().units(batch)
        return known if self.unmatched == "gold" else known & spans_of(batch).exact()

    def forward(self, batch: Batch, student: StudentOutput, teacher: TeacherSignal) -> Tensor:
        head, teacher_head = heads(batch, student, teacher, "MinED")
        assert student.hidden is not None and teacher.hidden is not None, "scope STATES sees hidden states"
        exact = spans_of(batch).exact()
        given = batch.mask & ~exact if self.unmatched == "gold" else torch.zeros_like(exact)
        ids = self._ids(batch, teacher_head.vocab_size, head.vocab_size)

        def distance(h: Tensor, teacher_h: Tensor) -> Tensor:
            log_q = torch.log_softmax(head(h) / self.temperature, -1)
            y = teacher_head(teacher_h) / self.temperature
            if ids is None:
                return forward_kl(torch.log_softmax(y, -1), log_q)
            passed = torch.softmax(y[:, ids[0]], -1)
            p = torch.zeros_like(log_q).index_add(-1, ids[1], passed)
            return torch.special.xlogy(p, p).sum(-1) - (p * log_q).sum(-1)

        def surprise(h: Tensor, target: Tensor) -> Tensor:
            return -torch.log_softmax(head(h) / self.temperature, -1).gather(-1, target.unsqueeze(-1)).squeeze(-1)

        size = chunk_size(head.vocab_size + teacher_head.vocab_size, batch.mask.device)
        known = map_chunks(distance, size, student.hidden[exact], teacher.hidden[exact])
        certain = map_chunks(surprise, size, student.hidden[given], batch.targets[given])
        values = known.new_zeros(batch.mask.shape).masked_scatter(exact, known)
        return self.scale * values.masked_scatter(given, certain)

    def _ids(self, batch: Batch, teacher_size: int, size: int) -> Tensor | None:
        """[2, M] the teacher's ids that pass on, and to which of the student's; None: each to itself."""
        if batch.teacher is None or not batch.teacher.foreign:
            return None
        assert self.nearest is not None, "match() comes before training with another tokenizer"
        nearest = self.nearest[:teacher_size]
        passing = ((nearest >= 0) & (nearest < size)).nonzero().squeeze(-1)
        return torch.stack([passing, nearest[passing]]).to(batch.mask.device)
