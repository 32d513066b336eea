"""The last layer of a language model, as data: a weight, a bias, and what some families do to the logits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Head:
    """logits = softcap(scale * (hidden @ weight.T + bias)), over the real ids only.

    `vocab_size` cuts the padded rows of an embedding before any softmax: they are not tokens.
    """

    weight: Tensor  # [V', D], V' >= vocab_size
    vocab_size: int
    bias: Tensor | None = None  # [V']
    scale: float = 1.0  # Cohere's logit_scale, 1 / Granite's logits_scaling
    softcap: float | None = None  # Gemma's final_logit_softcapping: s * tanh(z / s)

    @classmethod
    def of(cls, model: Any, vocab_size: int | None = None) -> Head:
        """The head of a transformers causal language model, cut to `vocab_size` real ids (default: all)."""
        linear = model.get_output_embeddings()
        config = model.config.get_text_config()
        scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
        rows = config.vocab_size
        return cls(
            weight=linear.weight,
            bias=getattr(linear, "bias", None),
            vocab_size=min(vocab_size or rows, rows),
            scale=float(scale),
            softcap=getattr(config, "final_logit_softcapping", None),
        )

    def cut(self, vocab_size: int | None) -> Head:
        """The same head over the first `vocab_size` ids; None is all."""
        return self if vocab_size is None else replace(self, vocab_size=min(self.vocab_size, vocab_size))

    def cast(self, dtype: torch.dtype) -> Head:
        """The same head over the real ids only, its weight detached and in `dtype`: for use on many chunks."""
        return replace(self, weight=self.weight[: self.vocab_size].detach().to(dtype))

    def __call__(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., D] -> logits [..., V] in float32 (in float64 with a float64 weight)."""
        weight = self.weight[: self.vocab_size]
        flat = hidden.reshape(-1, hidden.shape[-1])  # of three dimensions, matmul would copy the weight
        logits = torch.nn.functional.linear(flat.to(weight.dtype), weight)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.bias is not None:
            logits = logits + self.bias[: self.vocab_size].to(logits.dtype)
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits.view(*hidden.shape[:-1], self.vocab_size)
