"""What the ids of a tokenizer stand for, and which ids of two tokenizers stand for the same."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_BYTE = re.compile("<0x([0-9A-F]{2})>")

Key = bytes | str | None  # the bytes of an ordinary token, the name of a special one, None where an id is no token


def token_keys(tokenizer: Any) -> list[Key]:
    """Per id what it stands for, so that `Ġthe` of one tokenizer and `▁the` of another are both b" the".

    The ids of a vocabulary are written in one of three ways: a letter for each byte (GPT-2, Llama 3, Qwen), text with
    `▁` for a space and `<0x0A>` for a byte (SentencePiece), or plain text (`##` continues a word: WordPiece).
    """
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    special = set(getattr(tokenizer, "all_special_tokens", ()))
    added = {str(token) for token in getattr(tokenizer, "added_tokens_encoder", {})}
    read = _BYTES_OF[_writing(tokenizer, vocabulary)]
    keys: list[Key] = [None] * (1 + max(vocabulary.values()))
    for token, index in vocabulary.items():
        if token in special or re.fullmatch(r"<\|.*\|>", token):
            keys[index] = token
        else:
            keys[index] = token.encode() if token in added and not _BYTE.fullmatch(token) else read(token)
    return keys


def share_ids(one: Mapping[str, int], other: Mapping[str, int]) -> bool:
    """Whether two maps from token to id agree, or one only goes on where the other ends."""
    small, large = sorted((one, other), key=len)
    if any(large.get(token) != index for token, index in small.items()):
        return False
    more = set(large.values()) - set(small.values())
    return not more or min(more) > max(small.values())


def matched_ids(student: Any, teacher: Any) -> list[tuple[int, int]]:
    """(id of the student's, id of the teacher's) of the tokens that stand for the same, each id at most once.

    Special tokens match by name, and the two that end a text match each other whatever they are called.
    """
    own, other = (_known(token_keys(tokenizer)) for tokenizer in (student, teacher))
    pairs = {own[key]: other[key] for key in own.keys() & other.keys()}
    ends = student.eos_token_id, teacher.eos_token_id
    if None not in ends and ends[0] not in pairs and ends[1] not in pairs.values():
        pairs[ends[0]] = ends[1]
    return sorted(pairs.items())


def nearest_ids(student: Any, teacher: Any, *, near: bool = True) -> list[int]:
    """Per id of the teacher's the student's that stands for the same, or else, if `near`, for text that is one edit
    (a byte put in, left out or changed) away; -1 where there is none.

    Of several the lowest id, which is the commonest of a byte-pair vocabulary. Tokens of two bytes have no neighbours:
    an edit would leave nothing in common.
    """
    keys = token_keys(teacher)
    own = _known(token_keys(student))
    found = [-1] * len(keys)
    for mine, its in matched_ids(student, teacher):
        found[its] = mine
    for index, key in enumerate(keys):
        if found[index] < 0 and key is not None:
            found[index] = own.get(key, -1)  # a second id for the same bytes
    if near:
        ids = [i for i, key in enumerate(keys) if found[i] < 0 and isinstance(key, bytes) and len(key) > 2]
        for index, match in zip(ids, _one_edit_away([keys[i] for i in ids], own), strict=True):
            found[index] = match
    return found


def _known(keys: Sequence[Key]) -> dict[bytes | str, int]:
    """The lowest id of each key."""
    return _lowest((key, index) for index, key in enumerate(keys) if key is not None)


def _one_edit_away(tokens: Sequence[Any], known: dict[bytes | str, int]) -> list[int]:
    """Per token the lowest id of `known` at edit distance 1, or -1. Each token with one byte left out is looked up
    among the known with one byte left out, length by length: some ten look-ups a token."""
    by_length: dict[int, list[bytes]] = defaultdict(list)
    for key in known:
        if isinstance(key, bytes) and len(key) > 2:
            by_length[len(key)].append(key)
    wanted: dict[int, list[int]] = defaultdict(list)
    for place, token in enumerate(tokens):
        wanted[len(token)].append(place)
    found = [-1] * len(tokens)
    for length in sorted(wanted):
        changed = _lowest((cut, known[token]) for token in by_length[length] for cut in _cuts(token))
        longer = _lowest((rest, known[token]) for token in by_length[length + 1] for _, rest in _cuts(token))
        for place in wanted[length]:
            cuts = _cuts(tokens[place])
            shorter = [known.get(rest) for _, rest in cuts] if length > 3 else []
            matches = [longer.get(tokens[place]), *map(changed.get, cuts), *shorter]
            found[place] = min((match for match in matches if match is not None), default=-1)
    return found


def _lowest(items: Iterable[tuple[Any, int]]) -> dict[Any, int]:
    """The lowest id of each key."""
    lowest: dict[Any, int] = {}
    for key, index in items:
        if index < lowest.get(key, index + 1):
            lowest[key] = index
    return lowest


def _cuts(token: bytes) -> list[tuple[int, bytes]]:
    return [(i, token[:i] + token[i + 1 :]) for i in range(len(token))]


def _writing(tokenizer: Any, vocabulary: dict[str, int]) -> str:
    """`letters`, `spaces` or `words`: how the tokens are written, from the tokenizer's own decoder where it has one."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    described = json.loads(backend.to_str()) if backend is not None else {}
    parts = json.dumps([described.get("decoder"), described.get("pre_tokenizer")], ensure_ascii=False)
    if '"ByteLevel"' in parts:
        return "letters"
    if "▁" in parts or '"Metaspace"' in parts or '"ByteFallback"' in parts:
        return "spaces"
    if described.get("decoder"):
        return "words"
    if any("▁" in token for token in vocabulary):
        return "spaces"
    return "letters" if any("Ġ" in token for token in vocabulary) else "words"


def _from_letters(token: str) -> bytes:
    if all(letter in _LETTERS for letter in token):
        return bytes(_LETTERS[letter] for letter in token)
    return token.encode()


def _from_spaces(token: str) -> bytes:
    code = _BYTE.fullmatch(token)
    return bytes([int(code[1], 16)]) if code else token.replace("▁", " ").encode()


def _from_words(token: str) -> bytes:
    return token.removeprefix("##").encode()


def _letters() -> dict[str, int]:
    """GPT-2's letter of each byte: itself where it can be printed, else the next letter from 256 on."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


_LETTERS = _letters()
_BYTES_OF = {"letters": _from_letters, "spaces": _from_spaces, "words": _from_words}
