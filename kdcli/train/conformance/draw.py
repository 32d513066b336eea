"""Random numbers as models make them: hidden states, heads, attention, relations, log-probabilities."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kdcli.api import ModelShape, Need, Relations
from kdcli.ops.head import Head
from kdcli.train.conformance.batches import VOCAB

DENSE = Need.DISTRIBUTION | Need.LOGITS


def at_targets(values: Tensor, position: Tensor) -> Tensor:
    """[B, T', D] at the teacher's positions -> [B, T, D] at the student's, 0 where it has none."""
    index = position.clamp(min=0).unsqueeze(-1).expand(-1, -1, values.shape[-1])
    return values.gather(1, index) * (position >= 0).unsqueeze(-1)


class Draw:
    """Random float64 numbers of one standard deviation, in order. What a head or an embedding holds stays moderate
    where that is large, as in models: logits are large because of the head's weights."""

    def __init__(self, seed: int, spread: float) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.spread = spread
        self.moderate = min(spread, 2.0) / spread

    def __call__(self, *shape: int) -> Tensor:
        return self.spread * torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def logprobs(self, mask: Tensor) -> Tensor:
        """Of targets, [B, T]: those that a softmax over V gives, 0 where there is none."""
        return torch.log_softmax(self(*mask.shape, VOCAB), -1)[..., 0] * mask

    def hidden(self, shape: ModelShape, segment: Tensor) -> Tensor:
        return self(*segment.shape, shape.width) * (segment >= 0).unsqueeze(-1)

    def last(self, shape: ModelShape, segment: Tensor) -> Tensor:
        return self.hidden(shape, segment) * self.moderate

    def head(self, shape: ModelShape) -> Head:
        """With a bias and three rows that are no tokens; logits of `last` have the spread."""
        scale = 1 / (self.moderate * self.spread * math.sqrt(shape.width))
        rows = shape.vocab_size + 3
        return Head(weight=self(rows, shape.width) * scale, bias=0.3 * self(rows), vocab_size=shape.vocab_size)

    def layers(self, shape: ModelShape, segment: Tensor, needs: Need) -> dict[str, Any]:
        known: dict[str, Any] = {}
        if Need.HIDDEN in needs:
            known["hidden_states"] = tuple(self.hidden(shape, segment) for _ in range(shape.layers + 1))
            known["embedding"] = self(shape.vocab_size + 3, shape.width) * self.moderate
        if Need.ATTENTION in needs:
            known["attentions"] = tuple(self.attention(shape, segment) for _ in range(shape.layers))
        if Need.RELATIONS in needs:
            known["relations"] = tuple(self.relations(shape, segment) for _ in range(shape.layers))
        return known

    def attention(self, shape: ModelShape, segment: Tensor) -> Tensor:
        """[B, H, T, T]: rows sum to one over what is before them in the sequence; 0 elsewhere."""
        size = segment.shape[1]
        before = torch.tril(torch.ones(size, size, dtype=torch.bool))
        seen = before & (segment.unsqueeze(1) == segment.unsqueeze(2)) & (segment >= 0).unsqueeze(2)
        scores = self(len(segment), shape.heads, size, size).masked_fill(~seen.unsqueeze(1), -math.inf)
        return torch.softmax(scores, -1).nan_to_num(nan=0.0)

    def relations(self, shape: ModelShape, segment: Tensor) -> Relations:
        heads = {"queries": shape.heads, "keys": shape.kv_heads, "values": shape.kv_heads}
        real = (segment >= 0)[..., None, None]
        return Relations(
            **{name: self(*segment.shape, count, shape.head_width) * real for name, count in heads.items()}
        )
