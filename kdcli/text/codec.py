"""Drafts to token ids: where a learned stretch begins or ends, no token crosses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from kdcli.errors import ConfigError
from kdcli.text.align import Edge, edges
from kdcli.text.template import Draft, Span
from kdcli.text.vocabulary import token_keys


@dataclass(frozen=True)
class Tokens:
    """ids [T] int32, and mask [T] bool: True where the token itself is to be predicted. `edges` [T], where asked for:
    where each token ends in the text; an end token that is no part of it ends behind it."""

    ids: np.ndarray
    mask: np.ndarray
    edges: Sequence[Edge] = ()


class Codec:
    """A tokenizer, and what it does at the edges of a text.

    Text is cut at the boundaries of its spans and the pieces are tokenized one by one, as they are when a model is
    prompted and continues: a row's prompt has the ids that the prompt alone has. Tokenizers that mark the beginning
    of a text (SentencePiece's first space) would mark each piece; they get the whole text, and a token across the
    beginning of a span belongs to the span.

    `edges`: tokens are wanted with their edges. Raises ConfigError where the tokenizer cannot tell them.
    """

    def __init__(self, tokenizer: Any, *, edges: bool = False) -> None:
        self.tokenizer = tokenizer
        self.eos: int | None = tokenizer.eos_token_id
        self.begin = self._begin()
        x, y = self._ids(["x", "y"])
        self.joins = tokenizer.decode(x + y, clean_up_tokenization_spaces=False) == "xy"
        self.bytes = _bytes_of_ids(tokenizer) if edges else None

    def encode(self, drafts: Sequence[Draft]) -> list[Tokens]:
        """The tokens of each draft, all in one call of the tokenizer, which is parallel inside."""
        if not drafts:
            return []
        pieces = [_pieces(draft.text, draft.spans) if self.joins else [(draft.text, False)] for draft in drafts]
        texts = [text for row in pieces for text, _ in row]
        output = self.tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_offsets_mapping=not self.joins or self.bytes is not None,
            verbose=False,
        )
        offsets = output.get("offset_mapping") or [()] * len(texts)
        found = iter(zip(output["input_ids"], offsets, strict=True))
        return [
            self._tokens(draft, [(*piece, *next(found)) for piece in row])
            for draft, row in zip(drafts, pieces, strict=True)
        ]

    def _tokens(self, draft: Draft, pieces: Sequence[tuple[str, bool, list[int], Sequence[Span]]]) -> Tokens:
        """One draft's pieces (text, is it learned, ids, offsets) put together; `bare` text begins and ends."""
        ids: list[int] = []
        mask: list[bool] = []
        ends: list[Edge] = []
        behind = 0  # bytes
        for text, learned, own, offsets in pieces:
            ids += own
            mask += [learned] * len(own) if self.joins else _within(offsets, draft.spans)
            if self.bytes is not None:
                found = edges(text, [self.bytes[token] for token in own], offsets)
                ends += [(behind + byte, more) for byte, more in found]
                behind += len(text.encode())
        if draft.bare and ids[: len(self.begin)] != self.begin:
            ids, mask = self.begin + ids, [False] * len(self.begin) + mask
            ends = [(0, b"")] * len(self.begin) + ends
        if draft.bare and self.eos is not None and ids[-1:] != [self.eos]:
            ids, mask, ends = [*ids, self.eos], [*mask, True], [*ends, (behind + 1, b"")]
        return Tokens(np.asarray(ids, np.int32), np.asarray(mask, bool), ends if self.bytes is not None else ())

    def _ids(self, texts: list[str]) -> list[list[int]]:
        output = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return output["input_ids"]

    def _begin(self) -> list[int]:
        """The ids that the tokenizer puts in front of a text."""
        plain, full = self._ids(["x"])[0], list(self.tokenizer("x")["input_ids"])
        starts = [i for i in range(len(full)) if full[i : i + len(plain)] == plain]
        return full[: starts[0]] if starts else []


def _bytes_of_ids(tokenizer: Any) -> list[bytes]:
    """What each id adds to a text; of a special token its name."""
    if not tokenizer.is_fast:
        raise ConfigError(
            f"{type(tokenizer).__name__} cannot tell which text its tokens stand for, so it cannot be aligned with "
            "another tokenizer; take a model that has a tokenizer.json"
        )
    return [key.encode() if isinstance(key, str) else key or b"" for key in token_keys(tokenizer)]


def _pieces(text: str, spans: Sequence[Span]) -> list[tuple[str, bool]]:
    """The text cut at the spans: (piece, is it learned), without empty pieces."""
    cuts = sorted({0, len(text), *(edge for span in spans for edge in span)})
    return [
        (text[left:right], any(start <= left and right <= end for start, end in spans))
        for left, right in pairwise(cuts)
    ]


def _within(offsets: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
    """Whether each token belongs to a span: it ends inside."""
    return [any(a < right <= b and left < b for a, b in spans) for left, right in offsets]
