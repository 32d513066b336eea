"""The head and the shape of encoder-decoders."""

from __future__ import annotations

from typing import Any

from kdcli.api import ModelShape
from kdcli.ops.head import Head


def head_of(model: Any, vocab_size: int) -> Head:
    """The linear layer that makes the logits, with the bias that BART's kind adds to them.

    What a family does to the decoder's states before that layer (T5's scale) is done by the model itself.
    """
    linear = model.get_output_embeddings()
    bias = getattr(linear, "bias", None)
    added = getattr(model, "final_logits_bias", None)  # [1, V'], a buffer
    if added is not None:
        bias = added[0] if bias is None else bias + added[0]
    return Head(weight=linear.weight, bias=bias, vocab_size=min(vocab_size, linear.weight.shape[0]))


def decoder_shape(config: Any, vocab_size: int) -> ModelShape:
    """The decoder's, as a transformers config describes it."""
    layers = next(
        number
        for name in ("num_decoder_layers", "decoder_layers", "num_hidden_layers")
        if (number := getattr(config, name, None)) is not None
    )
    heads = getattr(config, "decoder_attention_heads", None) or config.num_attention_heads
    return ModelShape(
        layers=layers,
        width=config.hidden_size,
        heads=heads,
        kv_heads=heads,
        head_width=getattr(config, "d_kv", None) or config.hidden_size // heads,
        vocab_size=min(vocab_size, config.vocab_size),
    )
