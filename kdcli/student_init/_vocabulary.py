"""Smaller byte-pair tokenizers, and the rows of embeddings and heads that go with another vocabulary."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

from torch import Tensor

from kdcli.errors import ConfigError
from kdcli.store.models import real_ids
from kdcli.student_init._surgery import rebuilt

SPECIAL = ("bos", "eos", "pad", "unk", "sep", "cls", "mask")


class BytePairs:
    """What a byte-pair tokenizer is made of. Raises ConfigError for any other kind of tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self.tokenizer = tokenizer
        self.content: dict[str, Any] = json.loads(backend.to_str()) if backend is not None else {}
        model = self.content.get("model") or {}
        kind = model.get("type", type(tokenizer).__name__)
        if kind != "BPE" or model.get("end_of_word_suffix") or model.get("continuing_subword_prefix"):
            raise ConfigError(
                "student_init=trim_vocabulary takes byte-pair tokenizers (GPT-2, Llama, Mistral, Qwen, Gemma), and "
                f"this is {kind if kind != 'BPE' else 'one that marks the edges of words'}; student_init=transplant "
                "changes to another tokenizer"
            )
        self.vocabulary: dict[str, int] = model["vocab"]
        self.tokens = {index: token for token, index in self.vocabulary.items()}
        self.merges = [tuple(one.split(" ")) if isinstance(one, str) else tuple(one) for one in model["merges"]]
        self._ranks = {pair: rank for rank, pair in reversed(list(enumerate(self.merges)))}

    def always(self) -> set[int]:
        """Ids without which some text could not be written: special and added tokens, the one for the unknown, and
        letters: all, or where bytes (`<0x0A>`) stand in for other letters those, ASCII and the mark for a space."""
        model = self.content["model"]
        fallback = bool(model.get("byte_fallback"))
        named = {one["id"] for one in self.content["added_tokens"]} | set(self.tokenizer.all_special_ids)
        named |= {self.vocabulary[token] for token in (model.get("unk_token"),) if token in self.vocabulary}
        letters = {
            index
            for token, index in self.vocabulary.items()
            if (len(token) == 1 and (not fallback or token.isascii() or token == "▁"))
            or (fallback and len(token) == 6 and token.startswith("<0x"))
        }
        return named | letters

    def with_parts(self, index: int) -> set[int]:
        """A token and all that merges make on the way to it, without which it would not be made."""
        found, pieces = {index}, list(self.tokens.get(index, ""))
        while len(pieces) > 1:
            rank, place = min((self._ranks.get(pair, len(self.merges)), i) for i, pair in enumerate(pairwise(pieces)))
            if rank == len(self.merges):
                break  # an added token, or a word that the tokenizer takes whole
            pieces[place : place + 2] = ["".join(pieces[place : place + 2])]
            found.add(self.vocabulary[pieces[place]])
        return found | {self.vocabulary[piece] for piece in pieces if piece in self.vocabulary}

    def trimmed(self, ids: list[int]) -> Any:
        """A tokenizer with only `ids`, numbered anew in their order, and the merges whose parts and result are among
        them. Text whose tokens are all kept, each with its parts, has the same tokens: whatever merge was first
        before, was kept, and is first still."""
        from tokenizers import Tokenizer
        from transformers import PreTrainedTokenizerFast

        number = {old: new for new, old in enumerate(ids)}
        content, old = copy.deepcopy(self.content), self.tokenizer
        content["truncation"] = content["padding"] = None
        model = content["model"]
        model["vocab"] = {token: number[index] for token, index in self.vocabulary.items() if index in number}
        model["merges"] = [
            list(pair) for pair in self.merges if all(part in model["vocab"] for part in (*pair, "".join(pair)))
        ]
        for token in content["added_tokens"]:
            token["id"] = number[token["id"]]
        content["post_processor"] = _renumbered(content["post_processor"], number)
        names = [f"{role}_token" for role in SPECIAL]
        given = {name: token for name in names if (token := getattr(old, name, None)) is not None}
        more = [token for token in old.all_special_tokens if token not in map(str, given.values())]
        return PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(json.dumps(content)),
            **given,
            **({"extra_special_tokens": more} if more else {}),
            chat_template=old.chat_template,
            model_max_length=old.model_max_length,
            padding_side=old.padding_side,
            truncation_side=old.truncation_side,
            model_input_names=old.model_input_names,
            clean_up_tokenization_spaces=old.clean_up_tokenization_spaces,
        )


def with_rows(
    source: Any, tokenizer: Any, rows: Callable[[Tensor], Tensor], *, dtype: str, attention: str | None
) -> Any:
    """A new model whose embedding and head have a row for each of the tokenizer's ids: what `rows` makes of the old
    ones, [V, D], or [V, 1] of the head's bias. Special ids of its configs are the tokenizer's."""
    state = {name: value.detach().clone() for name, value in source.state_dict().items()}
    names = {id(module): name for name, module in source.named_modules()}
    for module in (source.get_input_embeddings(), source.get_output_embeddings()):
        for kind in ("weight", "bias"):
            name = f"{names[id(module)]}.{kind}"
            if name in state:
                value = state[name]
                state[name] = rows(value) if value.ndim == 2 else rows(value[:, None])[:, 0]
    config = copy.deepcopy(source.config)
    config.get_text_config().vocab_size = real_ids(tokenizer)
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "pad")}
    for key, index in special.items():
        setattr(config, key, index)
        setattr(config.get_text_config(), key, index)
    return rebuilt(source, config, state, dtype=dtype, attention=attention)


def _renumbered(part: Any, number: Mapping[int, int]) -> Any:
    """A tokenizer's post-processor with new ids: {"ids": [1]} or {"id": 1} of templates, ["</s>", 2] of others."""
    if isinstance(part, list):
        if len(part) == 2 and isinstance(part[0], str) and isinstance(part[1], int):
            return [part[0], number[part[1]]]
        return [_renumbered(item, number) for item in part]
    if isinstance(part, dict):
        return {
            key: [number[index] for index in value] if key == "ids" else _renumbered(value, number)
            for key, value in part.items()
        }
    return part
