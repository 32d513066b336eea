"""Two tokenizers on one answer: the shortest stretches of its bytes that both cut alike.

An edge is where a token ends: (bytes of the text behind it, what else is behind it). The second part is empty wherever
a token ends between two bytes of the text. It is the bytes since then where a tokenizer has changed the text (NFKC
makes three letters of `½`) or put something in front of it (SentencePiece's first space), so that equal edges mean
equal text before them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np

Edge = tuple[int, bytes]
NONE = -1  # the span of a token that has no counterpart
BEFORE: Edge = (-1, b"")  # the edge of tokens in front of an answer, such as white space of a template
CLOSED: Edge = (-1, b"closed")  # the edge behind what closes an answer, however either side writes it


def edges(text: str, tokens: Sequence[bytes], offsets: Sequence[tuple[int, int]]) -> list[Edge]:
    """Where each token of `text` ends: by the tokens' own bytes where they make up the text, else by their offsets.

    Offsets count characters: parts of a character share them, and some tokenizers leave out spaces.
    """
    raw, written = text.encode(), b"".join(tokens)
    behind = list(accumulate(map(len, tokens)))
    if written == raw:
        return [(byte, b"") for byte in behind]
    if written == b" " + raw:  # SentencePiece's first space
        return [(byte - 1, b"") if byte > 1 else (0, b" " * byte) for byte in behind]
    return _by_offsets(text, tokens, offsets)


def _by_offsets(text: str, tokens: Sequence[bytes], offsets: Sequence[tuple[int, int]]) -> list[Edge]:
    """A token ends between two characters where no later token begins earlier. A stretch between two such places is
    cut further by its tokens' bytes, which count as bytes of the text if they are all of its bytes."""
    bytes_before = [0, *accumulate(len(character.encode()) for character in text)]
    later = [*accumulate(reversed([start for start, _ in offsets]), min)][::-1]  # the earliest start from here on
    found: list[Edge] = []
    reach, begin, first = 0, 0, 0  # characters behind this token, and behind the stretch; the stretch's first token
    for number, (_, end) in enumerate(offsets):
        reach = max(reach, end)
        next_start = later[number + 1] if number + 1 < len(offsets) else len(text)
        if next_start < reach:
            continue
        while reach < next_start and not text[reach].isspace():  # such as an accent that the token has swallowed
            reach += 1
        within = list(accumulate(tokens[first : number + 1]))
        stretch = text[begin:reach].encode()
        base = bytes_before[begin]
        if within[-1] == stretch:
            found += [(base + len(part), b"") for part in within]
        else:
            found += [(base, part) for part in within[:-1]] + [(bytes_before[reach], b"")]
        begin, first = reach, number + 1
    assert len(found) == len(tokens), f"{len(found)} edges of {len(tokens)} tokens"
    return found


def answer_edges(ends: Sequence[Edge], begin: int, end: int) -> list[Edge | None]:
    """The edges of one answer's tokens, as bytes of the answer, which is bytes [begin, end) of the text.

    BEFORE where a token ends before the answer begins, None inside of what closes it. The last token beyond the answer
    has the edge CLOSED: both models close the answer there, each in its own way, after the same bytes.
    """
    found: list[Edge | None] = []
    for number, (byte, more) in enumerate(ends):
        if byte > end:
            found.append(CLOSED if number == len(ends) - 1 else None)
        else:
            found.append(BEFORE if byte <= begin and not more else (byte - begin, more))
    return found


def align(student: Sequence[Edge | None], teacher: Sequence[Edge | None]) -> tuple[np.ndarray, np.ndarray]:
    """The span of each token, int32 [T] and [T'], numbered from 0 in the order of the text.

    A span begins where the last one ended and ends at the next edge that both have; of several tokens with one edge
    the last ends it. Tokens before the answer, and behind the last common edge, are of no span.
    """
    begin = _lead(student), _lead(teacher)
    places = {edge: place for place, edge in enumerate(teacher)}
    spans = np.full(len(student), NONE, np.int32), np.full(len(teacher), NONE, np.int32)
    number = 0
    for edge, place in {edge: place for place, edge in enumerate(student)}.items():
        other = NONE if edge in (None, BEFORE) else places.get(edge, NONE)
        if place >= begin[0] and other >= begin[1]:
            spans[0][begin[0] : place + 1] = number
            spans[1][begin[1] : other + 1] = number
            begin, number = (place + 1, other + 1), number + 1
    return spans


def _lead(found: Sequence[Edge | None]) -> int:
    """How many tokens there are up to the last that ends before the answer."""
    return 1 + max((place for place, edge in enumerate(found) if edge == BEFORE), default=NONE)
