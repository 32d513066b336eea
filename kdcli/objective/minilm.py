"""Self-attention relations: Wang et al. 2021 (MiniLMv2), arXiv:2012.15828."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal, Unpack

import torch
from torch import Tensor

from kdcli.api import Batch, ModelShape, Need, Relations, StudentOutput, TeacherSignal, TokenSettings
from kdcli.errors import ConfigError
from kdcli.objective._layers import Layered, Layers, spread, upcast, visible

Kind = Literal["queries", "keys", "values"]


class MiniLM(Layered):
    """KL(R_t || R_s) of relations, per supervised position i, mean over relation heads, kinds and pairs of layers:

        R = softmax_j(x_i . x_j / sqrt(d)),   x of one relation head, j in i's sequence and not after i

    for each kind X in `relations`; of an encoder j is anywhere in the sequence. The vectors of all heads are put beside
    each other and cut into `heads` relation heads (the paper's A_r) of d numbers each, so that models with other
    numbers and widths of heads compare; grouped keys and values are cut as they are, without being repeated.
    `heads: null` takes the greatest common divisor of both models' key-value heads, which always fits. Pairs of layers
    count from 1; the paper takes the student's last with one of the teacher's upper middle, and sums the kinds (weights
    alpha_i = 1: `weight` times their number).

    Departs from the paper: the mask of causal models (its models are encoders); queries and keys are compared before
    rotation, so relations hold no positions. Raises ConfigError if `heads` does not divide the widths.
    """

    needs = Need.RELATIONS
    embedding: ClassVar[int] = 1

    def __init__(
        self,
        *,
        layers: Layers = "last",
        relations: Sequence[Kind] = ("queries", "keys", "values"),
        heads: int | None = None,
        **settings: Unpack[TokenSettings],
    ) -> None:
        super().__init__(layers=layers, **settings)
        if not relations or len(set(relations)) < len(relations):
            raise ConfigError(f"MiniLM: relations is {list(relations)}; name queries, keys or values, each once")
        if heads is not None and heads < 1:
            raise ConfigError(f"MiniLM: heads is {heads}; set a number above 0, or null")
        self.relations = tuple(relations)
        self.heads = heads

    def fit(self, student: ModelShape, teacher: ModelShape | None) -> None:
        super().fit(student, teacher)
        assert teacher is not None, "Layered.fit refuses it"
        if self.heads is None:
            return
        for who, shape in (("student", student), ("teacher", teacher)):
            for kind in self.relations:
                width = shape.head_width * (shape.heads if kind == "queries" else shape.kv_heads)
                if width % self.heads:
                    raise ConfigError(
                        f"MiniLM: heads is {self.heads}, which does not divide the {width} numbers of the {who}'s "
                        f"{kind}; set a divisor of {math.gcd(*_widths(student), *_widths(teacher))}, or null"
                    )

    def forward(self, batch: Batch, student: StudentOutput, teacher: TeacherSignal) -> Tensor:
        ours, theirs = student.relations, teacher.relations
        assert ours is not None and theirs is not None, "it needs RELATIONS"
        chosen = [(ours[s - 1], theirs[t - 1]) for s, t in self.pairs(len(ours), len(theirs))]
        values = []
        for row in range(len(batch.mask)):
            asked, seen = batch.mask[row], visible(batch, row, student.bidirectional)
            parts = [self._row(one, other, row, asked, seen, kind) for one, other in chosen for kind in self.relations]
            values.append(torch.stack(parts).mean(0))
        return spread(torch.cat(values), batch.mask)

    def _row(self, one: Relations, other: Relations, row: int, asked: Tensor, seen: Tensor, kind: str) -> Tensor:
        """One kind of one pair of layers at the n positions `asked` of a row, [n]."""
        heads = self.heads or math.gcd(one.keys.shape[-2], other.keys.shape[-2])
        log_q, log_p = (_log_relation(getattr(r, kind)[row], heads, asked, seen) for r in (one, other))
        ratio = (log_p - log_q).masked_fill(~seen, 0.0)  # -inf - -inf
        return (log_p.exp() * ratio).sum(-1).mean(0)


def _log_relation(vectors: Tensor, heads: int, asked: Tensor, seen: Tensor) -> Tensor:
    """Vectors [T, H, W] -> log R [A_r, n, T], -inf where not `seen`."""
    cut = upcast(vectors).flatten(1).unflatten(1, (heads, -1)).transpose(0, 1)  # [A_r, T, d]
    cut = torch.where(seen.any(0)[:, None], cut, 0.0)  # what nobody sees may be anything, also infinite
    scores = cut[:, asked] @ cut.transpose(1, 2) / math.sqrt(cut.shape[-1])
    return scores.masked_fill(~seen, -math.inf).log_softmax(-1)


def _widths(shape: ModelShape) -> tuple[int, int]:
    return shape.heads * shape.head_width, shape.kv_heads * shape.head_width
