"""New tokens of a student: in its tokenizer, and in its embedding and head as means of what they stand for."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kdcli.errors import ConfigError
from kdcli.store.models import real_ids

NewTokens = Sequence[str] | Mapping[str, str | None]
OURS = "_kdcli_extended"  # set on a tokenizer that has them from us


def described(tokens: NewTokens | None) -> dict[str, str | None]:
    """Each new token's description; None where it has none. Raises ConfigError for an empty or doubled one."""
    named = {} if tokens is None else dict(tokens) if isinstance(tokens, Mapping) else dict.fromkeys(tokens)
    if "" in named or (tokens is not None and len(named) != len(tokens)):
        problem = "one is empty" if "" in named else "one stands twice"
        raise ConfigError(f"student.new_tokens: {problem}; name each new token once")
    return named


def extended(tokenizer: Any, tokens: Mapping[str, str | None]) -> Any:
    """A copy of a tokenizer that has the tokens, with ids beyond its own.

    Raises ConfigError for a token that it has already, and for a description without one known token.
    """
    if not tokens or getattr(tokenizer, OURS, False):
        return tokenizer
    from tokenizers import AddedToken

    known = tokenizer.get_vocab()
    if twice := [token for token in tokens if token in known]:
        raise ConfigError(f"student.new_tokens: {twice[0]} is a token already (id {known[twice[0]]}); leave it out")
    for token, text in tokens.items():
        if text is not None and not _ids(tokenizer, text):
            raise ConfigError(f"student.new_tokens: {token}: the description {text!r} has no token; write it in words")
    real, own = real_ids(tokenizer), copy.deepcopy(tokenizer)
    own.add_tokens([AddedToken(token, normalized=False) for token in tokens])
    ids = sorted(own.convert_tokens_to_ids(token) for token in tokens)
    if ids != list(range(real, real + len(tokens))):
        raise ConfigError(
            f"student.new_tokens: this tokenizer gives them the ids {ids}, and not those after {real - 1}"
        )
    setattr(own, OURS, True)
    return own


@torch.no_grad()
def embed(model: Any, tokenizer: Any, tokens: Mapping[str, str | None]) -> None:
    """Give each new token a row in embedding and head: the mean of its description's tokens' rows, or else of all. Rows
    that were padding are used first; the model grows where there are too few."""
    if not tokens:
        return
    first = real_ids(tokenizer) - len(tokens)
    if model.get_input_embeddings().weight.shape[0] < first + len(tokens):
        with torch.random.fork_rng():  # what is drawn for the new rows is overwritten
            model.resize_token_embeddings(first + len(tokens), mean_resizing=False)
    for matrix in _matrices(model):
        mean = matrix[:first].double().mean(0)
        for token, text in tokens.items():
            ids = [one for one in _ids(tokenizer, text) if one < first] if text else []
            row = matrix[torch.tensor(ids, device=matrix.device)].double().mean(0) if ids else mean
            matrix[tokenizer.convert_tokens_to_ids(token)] = row.to(matrix.dtype)


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _matrices(model: Any) -> list[Tensor]:
    """What has a row per id: the embedding, and the head and its bias where they are apart from it."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    found = [embedding]
    if head is not None and head.weight is not embedding:
        found.append(head.weight)
    if head is not None and getattr(head, "bias", None) is not None:
        found.append(head.bias)
    return [parameter.data for parameter in found]
