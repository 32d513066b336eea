"""General online logit distillation: Patiño et al. 2025 (GOLD), as in TRL's experimental GOLDTrainer."""

from __future__ import annotations

from typing import Any, Literal, Unpack

import torch
from torch import Tensor

from kdcli.api import Batch, Need, Scope, StudentOutput, TeacherSignal
from kdcli.errors import ConfigError
from kdcli.objective._between import Between, between, check_beta
from kdcli.objective._spans import Spans, heads, spans_of, teacher_hidden, teacher_targets
from kdcli.objective._tempered import Tempered, TemperedSettings
from kdcli.ops.chunked import chunk_size, map_chunks
from kdcli.ops.head import Head
from kdcli.ops.logprob import log1mexp
from kdcli.ops.optimal_transport import sorted_distance
from kdcli.text.vocabulary import matched_ids

Merge = Literal["bayesian", "observed"]


class GOLD(Tempered):
    """Per span the distance of P(v) = p(v | ...) prod p(y_j), the teacher's, and Q(v), the student's likewise.

    A span is the shortest stretch of text that both tokenizers cut alike. `merge` (`uld_token_merge_strategy`) says
    where p(v | ...) is taken: `bayesian` at the span's last token, times the probabilities of its earlier tokens, so
    that P(v) is the chain rule's; `observed` at its first, times those of the later ones. The distance is ULD's
    sum |sort(Q) - sort(P)|, or with `hybrid` (`uld_use_hybrid_loss`)

        w D(P, Q on ids that stand for the same bytes in both vocabularies) + (1 - w) sum |sort(Q) - sort(P)| on others

    with w = `matched_weight`, by default the share of the teacher's ids that match, and D = `divergence`, which at
    TRL's `beta` of 0 and 1 is forward_kl and reverse_kl. The number stands at the span's first target, and
    `reduction: sequence` is TRL's mean.

    Departs from TRL: `observed` reads the predictions of the tokens, and not those of their successors;
    the matched ids of D come with one more symbol for all else that could have stood there, without which P and Q do
    not sum to one and D falls below 0; ids match by bytes and not by how a tokenizer writes them; nothing is held
    above 1e-8; one temperature. Needs the whole vocabulary: raises ConfigError for a teacher that gives top-k only,
    and for a beta or matched_weight out of range.
    """

    needs = Need.LOGITS
    scope = Scope.STATES
    cross_tokenizer = True

    def __init__(
        self,
        *,
        merge: Merge = "bayesian",
        hybrid: bool = False,
        matched_weight: float | None = None,
        divergence: Between = "generalized_jsd",
        beta: float = 0.5,
        **settings: Unpack[TemperedSettings],
    ) -> None:
        super().__init__(**settings)
        check_beta("GOLD", beta)
        if matched_weight is not None and not 0 <= matched_weight <= 1:
            raise ConfigError(f"GOLD: matched_weight is {matched_weight}; set a share in [0, 1], or null")
        self.merge: Merge = merge
        self.hybrid = hybrid
        self.matched_weight = matched_weight
        self.divergence: Between = divergence
        self.beta = beta
        self.matched: Tensor | None = None  # [M, 2] ids of student and teacher, from `match` on

    def match(self, student: Any, teacher: Any) -> None:
        if self.hybrid:
            self.matched = torch.tensor(matched_ids(student, teacher), dtype=torch.int64).view(-1, 2)

    def units(self, batch: Batch) -> Tensor:
        return super().units(batch) & spans_of(batch).starts()

    def forward(self, batch: Batch, student: StudentOutput, teacher: TeacherSignal) -> Tensor:
        spans = spans_of(batch)
        head, teacher_head = heads(batch, student, teacher, "GOLD")
        assert student.hidden is not None, "scope STATES sees hidden states"
        of_student = self._merged(student.hidden, batch.targets, spans, spans.student, head)
        of_teacher = self._merged(
            teacher_hidden(batch, teacher), teacher_targets(batch), spans, spans.teacher, teacher_head
        )
        pairs = self._pairs(batch, head, teacher_head) if self.hybrid else None

        def distance(h: Tensor, others: Tensor, teacher_h: Tensor, teacher_others: Tensor) -> Tensor:
            log_q = torch.log_softmax(head(h) / self.temperature, -1) + others.unsqueeze(-1)
            log_p = torch.log_softmax(teacher_head(teacher_h) / self.temperature, -1) + teacher_others.unsqueeze(-1)
            if pairs is None:
                return sorted_distance(log_p.exp(), log_q.exp())
            return self._hybrid(log_p, log_q, teacher_others, others, pairs)

        size = chunk_size(head.vocab_size + teacher_head.vocab_size, batch.mask.device)
        return spans.at_starts(self.scale * map_chunks(distance, size, *of_student, *of_teacher))

    def _merged(self, hidden: Tensor, targets: Tensor, spans: Spans, of: Tensor, head: Head) -> tuple[Tensor, Tensor]:
        """Hidden states [S, D] at each span's last (or first) token, and log prod p(y_j) [S] of its other tokens."""
        base = spans.last(of) if self.merge == "bayesian" else spans.first(of)
        other = (of >= 0).flatten()
        other[base] = False

        def score(h: Tensor, target: Tensor) -> Tensor:
            return torch.log_softmax(head(h) / self.temperature, -1).gather(-1, target.unsqueeze(-1)).squeeze(-1)

        flat = hidden.flatten(0, 1)
        size = chunk_size(head.vocab_size, hidden.device)
        scores = map_chunks(score, size, flat[other], targets.flatten()[other])
        product = scores.new_zeros(spans.number).index_add(0, of.flatten()[other], scores)
        return flat[base], product

    def _pairs(self, batch: Batch, head: Head, teacher_head: Head) -> Tensor:
        """[M, 2] matched ids: each with itself where the tokenizer is shared."""
        if batch.teacher is None or not batch.teacher.foreign:
            return torch.arange(head.vocab_size, device=batch.mask.device).unsqueeze(-1).expand(-1, 2)
        assert self.matched is not None, "match() comes before training with another tokenizer"
        sizes = torch.tensor([head.vocab_size, teacher_head.vocab_size])
        return self.matched[(self.matched < sizes).all(-1)].to(batch.mask.device)

    def _hybrid(self, log_p: Tensor, log_q: Tensor, teacher_others: Tensor, others: Tensor, pairs: Tensor) -> Tensor:
        """[C] of log P [C, V'] and log Q [C, V]."""
        matched_q, single_q = _split(log_q, pairs[:, 0])
        matched_p, single_p = _split(log_p, pairs[:, 1])
        complete_p = torch.cat([matched_p, _rest(single_p, teacher_others)], -1)
        complete_q = torch.cat([matched_q, _rest(single_q, others)], -1)
        matched = between(self.divergence, complete_p, complete_q, self.beta)
        weight = len(pairs) / log_p.shape[-1] if self.matched_weight is None else self.matched_weight
        return weight * matched + (1 - weight) * sorted_distance(single_p.exp(), single_q.exp())


def _split(logprobs: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """[C, V] -> [C, M] of the matched ids in their order, and [C, V - M] of the others."""
    single = torch.ones(logprobs.shape[-1], dtype=torch.bool, device=ids.device)
    single[ids] = False
    return logprobs[:, ids], logprobs[:, single]


def _rest(single: Tensor, others: Tensor) -> Tensor:
    """[C, 1] log of what is left of 1: unmatched ids, and what else could have stood where the other tokens are."""
    missed = log1mexp(others.clamp(max=-1e-30)).unsqueeze(-1)  # log 0 of a span of one token has no slope
    return torch.cat([single, missed], -1).logsumexp(-1, keepdim=True)
