"""Tiny encoders and encoder-decoders with real tokenizers trained on the spot, as folders that transformers loads."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, PreTrainedTokenizerFast

LABELS = ["bad", "good", "plain"]
WORDS = {"bad": "awful poor dull", "good": "great fine warm", "plain": "grey stone road"}
CORPUS = ["the film was " + text + " and so it is" for text in WORDS.values()] * 4 + list(WORDS)

_BERT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 40,
    "initializer_range": 0.3,
}
ENCODERS: dict[str, dict[str, Any]] = {
    "bert": _BERT,
    "roberta": _BERT | {"type_vocab_size": 1},
    "electra": _BERT | {"embedding_size": 12},
    "deberta-v2": _BERT | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "type_vocab_size": 0},
    "distilbert": {
        "dim": 16,
        "hidden_dim": 32,
        "n_layers": 3,
        "n_heads": 2,
        "max_position_embeddings": 40,
        "initializer_range": 0.3,
    },
}
_T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 2}
_BART = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 40,
    "init_std": 0.3,
}
WRITERS: dict[str, dict[str, Any]] = {
    "t5": _T5 | {"initializer_factor": 1.0},
    "t5_untied": _T5 | {"model_type": "t5", "tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"},
    "bart": _BART,
}


@cache
def wordpiece() -> Any:
    """BERT's kind: [CLS] text [SEP]."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=120, special_tokens=special))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **dict(zip(names, special, strict=True)))


@cache
def byte_pairs() -> Any:
    """RoBERTa's and BART's kind: <s> text </s>."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=140, special_tokens=special))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    names = {"bos_token": "<s>", "cls_token": "<s>", "eos_token": "</s>", "sep_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", mask_token="<mask>", **names)


@cache
def unigrams() -> Any:
    """T5's kind: text </s>."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    tokenizer.train_from_iterator(
        CORPUS, trainers.UnigramTrainer(vocab_size=90, special_tokens=special, unk_token="<unk>")
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def tokenizer_of(family: str) -> Any:
    if family.startswith("t5"):
        return unigrams()
    return byte_pairs() if family in ("roberta", "bart") else wordpiece()


def config(family: str, **changes: Any) -> Any:
    """A tiny config; padded rows of the embedding, as real T5s have them."""
    settings = dict((ENCODERS | WRITERS)[family])
    tokenizer = tokenizer_of(family)
    settings |= {"vocab_size": len(tokenizer) + 7, "pad_token_id": tokenizer.pad_token_id}
    if family in WRITERS:
        start = tokenizer.pad_token_id if family.startswith("t5") else tokenizer.eos_token_id
        settings |= {"decoder_start_token_id": start, "eos_token_id": tokenizer.eos_token_id}
    else:
        settings |= {"id2label": dict(enumerate(LABELS)), "label2id": {name: i for i, name in enumerate(LABELS)}}
    return AutoConfig.for_model(settings.pop("model_type", family), **(settings | changes))


def folder(path: Path, family: str, auto: str | None = None, seed: int = 0, **changes: Any) -> str:
    """A random model and its tokenizer in `path`."""
    kind = auto or ("AutoModelForSeq2SeqLM" if family in WRITERS else "AutoModelForSequenceClassification")
    torch.manual_seed(seed)
    model = getattr(transformers, kind).from_config(config(family, **changes))
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.normal_()
    model.save_pretrained(path)
    tokenizer_of(family).save_pretrained(path)
    return str(path)
