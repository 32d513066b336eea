"""What the ids of real tokenizers stand for, and which of two vocabularies stand for the same."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest

from kdcli.text.vocabulary import matched_ids, nearest_ids, token_keys
from tests.text.tokenizers import byte_level, metaspace, shipped

TEXT = "naïve café 日本 ✓\n\n2 + 2 = 4, she said."


def plain(tokens: list[str], **names: Any) -> SimpleNamespace:
    """A tokenizer that is its vocabulary."""
    return SimpleNamespace(get_vocab=lambda: {t: i for i, t in enumerate(tokens)}, eos_token_id=None, **names)


@pytest.mark.parametrize("make", [byte_level, metaspace, shipped])
def test_the_keys_of_a_text_are_its_bytes(make: Any) -> None:
    tokenizer = make()
    keys = token_keys(tokenizer)
    pieces = [keys[i] for i in tokenizer(TEXT, add_special_tokens=False)["input_ids"]]
    assert all(isinstance(piece, bytes) for piece in pieces)
    assert b"".join(pieces).removeprefix(b" ") == TEXT.encode()  # pyright: ignore


def test_special_tokens_are_names_and_holes_are_no_tokens() -> None:
    keys = token_keys(byte_level())
    assert keys[byte_level().eos_token_id] == "</s>"
    assert keys[byte_level().convert_tokens_to_ids("<|im_end|>")] == "<|im_end|>"
    sparse = SimpleNamespace(get_vocab=lambda: {"a": 0, "b": 2})
    assert token_keys(sparse) == [b"a", None, b"b"]


def test_a_word_that_is_continued_is_its_letters() -> None:
    assert token_keys(plain(["play", "##ing"])) == [b"play", b"ing"]


def test_matches_stand_for_the_same_and_are_one_to_one() -> None:
    pairs = matched_ids(byte_level(), metaspace())
    own, other = token_keys(byte_level()), token_keys(metaspace())
    assert all(own[mine] == other[its] for mine, its in pairs)
    assert len({mine for mine, _ in pairs}) == len({its for _, its in pairs}) == len(pairs)
    assert {own[mine] for mine, _ in pairs} == (set(own) & set(other)) - {None}


def test_a_vocabulary_matches_itself() -> None:
    pairs = matched_ids(byte_level(), byte_level())
    assert pairs == [(i, i) for i in range(len(token_keys(byte_level())))]


def test_the_ends_of_texts_match_whatever_they_are_called() -> None:
    one, other = plain(["a", "</s>"], all_special_tokens=["</s>"]), plain(["<eos>", "b"], all_special_tokens=["<eos>"])
    one.eos_token_id, other.eos_token_id = 1, 0
    assert matched_ids(one, other) == [(1, 0)]


def distance(one: str, other: str) -> int:
    """Levenshtein's, by the book."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        previous, row = row, [i]
        for j, b in enumerate(other, 1):
            row.append(min(previous[j] + 1, row[-1] + 1, previous[j - 1] + (a != b)))
    return row[-1]


def test_neighbours_are_the_lowest_ids_one_edit_away() -> None:
    draw = random.Random(3)
    own, other = (
        sorted({"".join(draw.choice("abc") for _ in range(draw.randint(1, 6))) for _ in range(90)}) for _ in range(2)
    )
    found = nearest_ids(plain(own), plain(other))
    for token, match in zip(other, found, strict=True):
        near = [i for i, known in enumerate(own) if min(len(known), len(token)) > 2 and distance(known, token) == 1]
        assert match == (own.index(token) if token in own else min(near, default=-1))
    exact = nearest_ids(plain(own), plain(other), near=False)
    assert exact == [own.index(token) if token in own else -1 for token in other]


def test_every_id_of_equal_bytes_is_passed_on() -> None:
    """SentencePiece has both `<0x0A>` and a line break among its tokens."""
    assert nearest_ids(plain(["▁a", "<0x0A>"]), plain(["\n", "▁a", "<0x0A>"])) == [1, 0, 1]
