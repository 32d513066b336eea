"""Drafts to token ids: where a learned stretch begins or ends, no token crosses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from kdcli.text.template import Draft, Span


@dataclass(frozen=True)
class Tokens:
    """ids [T] int32, and mask [T] bool: True where the token itself is to be predicted."""

    ids: np.ndarray
    mask: np.ndarray


class Codec:
    """A tokenizer, and what it does at the edges of a text.

    Text is cut at the boundaries of its spans and the pieces are tokenized one by one, as they are when a model is
    prompted and continues: a row's prompt has the ids that the prompt alone has. Tokenizers that mark the beginning
    of a text (SentencePiece's first space) would mark each piece; they get the whole text, and a token across the
    beginning of a span belongs to the span.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.eos: int | None = tokenizer.eos_token_id
        self.begin = self._begin()
        x, y = self._ids(["x", "y"])
        self.joins = tokenizer.decode(x + y, clean_up_tokenization_spaces=False) == "xy"

    def encode(self, drafts: Sequence[Draft]) -> list[Tokens]:
        """The tokens of each draft, all in one call of the tokenizer, which is parallel inside."""
        if not drafts:
            return []
        encoded = self._by_pieces(drafts) if self.joins else self._by_offsets(drafts)
        return [self._close(draft, ids, mask) for draft, (ids, mask) in zip(drafts, encoded, strict=True)]

    def _by_pieces(self, drafts: Sequence[Draft]) -> list[tuple[list[int], list[bool]]]:
        pieces = [_pieces(draft.text, draft.spans) for draft in drafts]
        ids = iter(self._ids([text for row in pieces for text, _ in row]))
        encoded = []
        for row in pieces:
            tokens = [(token, learned) for _, learned in row for token in next(ids)]
            encoded.append(([token for token, _ in tokens], [learned for _, learned in tokens]))
        return encoded

    def _by_offsets(self, drafts: Sequence[Draft]) -> list[tuple[list[int], list[bool]]]:
        texts = [draft.text for draft in drafts]
        output = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return [
            (ids, [any(a < right <= b and left < b for a, b in draft.spans) for left, right in offsets])
            for draft, ids, offsets in zip(drafts, output["input_ids"], output["offset_mapping"], strict=True)
        ]

    def _close(self, draft: Draft, ids: list[int], mask: list[bool]) -> Tokens:
        if draft.bare and ids[: len(self.begin)] != self.begin:
            ids, mask = self.begin + ids, [False] * len(self.begin) + mask
        if draft.bare and self.eos is not None and ids[-1:] != [self.eos]:
            ids, mask = [*ids, self.eos], [*mask, True]
        return Tokens(np.asarray(ids, np.int32), np.asarray(mask, bool))

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        output = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return output["input_ids"]

    def _begin(self) -> list[int]:
        """The ids that the tokenizer puts in front of a text."""
        plain, full = self._ids(["x"])[0], list(self.tokenizer("x")["input_ids"])
        starts = [i for i in range(len(full)) if full[i : i + len(plain)] == plain]
        return full[: starts[0]] if starts else []


def _pieces(text: str, spans: Sequence[Span]) -> list[tuple[str, bool]]:
    """The text cut at the spans: (piece, is it learned), without empty pieces."""
    cuts = sorted({0, len(text), *(edge for span in spans for edge in span)})
    return [
        (text[left:right], any(start <= left and right <= end for start, end in spans))
        for left, right in pairwise(cuts)
    ]
