"""Small models of several architectures with a tokenizer, as folders that transformers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

WORDS = ["<eos>", "<pad>", *(f"w{i}" for i in range(38))]  # 40 real ids
ROWS = 48  # rows of the embedding: 8 of them are padding

_LLAMA_LIKE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _LLAMA_LIKE,
    "llama_tied": _LLAMA_LIKE | {"model_type": "llama", "tie_word_embeddings": True},
    "mistral": _LLAMA_LIKE | {"sliding_window": 5},
    "qwen2": {key: value for key, value in _LLAMA_LIKE.items() if key != "head_dim"}
    | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
    "qwen3": _LLAMA_LIKE,
    "gemma3_text": _LLAMA_LIKE | {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "gpt2": {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64, "initializer_range": 0.3},
}


def config(family: str, **changes: Any) -> Any:
    settings = dict(FAMILIES[family]) | {"vocab_size": ROWS, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    return AutoConfig.for_model(settings.pop("model_type", family), **(settings | changes))


def model(family: str, seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config(family, **changes)).eval()


def tokenizer() -> Any:
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = Whitespace()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", bos_token="<eos>", pad_token="<pad>")


def folder(path: Path, family: str = "llama", **changes: Any) -> str:
    """Save a model and its tokenizer in `path`."""
    model(family, **changes).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return str(path)


def ids(seed: int = 0, rows: int = 3, length: int = 12) -> torch.Tensor:
    return torch.randint(2, len(WORDS), (rows, length), generator=torch.Generator().manual_seed(seed))


def logits(model: Any, input_ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=input_ids, use_cache=False).logits
