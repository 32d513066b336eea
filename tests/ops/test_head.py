"""The head we read from a model gives the model's own logits, for the families with their particulars."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kdcli.ops.head import Head

SMALL = dict(
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    vocab_size=40,
)
FAMILIES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "mistral": {},
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 3.0},
    "gemma3_text": {"head_dim": 8},
    "cohere": {"logit_scale": 0.25, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    "granite": {"logits_scaling": 4.0},
    "phi": {},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_state_through_our_head_is_the_models_logits(family: str) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SMALL, **FAMILIES[family]})
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(3, 40, (2, 7))
    with torch.no_grad():
        expected = model(ids).logits
        hidden = model.base_model(ids, use_cache=False).last_hidden_state
        torch.testing.assert_close(Head.of(model)(hidden), expected.float(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(Head.of(model, 30)(hidden), expected[..., :30].float(), rtol=1e-5, atol=1e-6)
