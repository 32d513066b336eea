"""Regular expressions with an end to every repeat."""

from __future__ import annotations

import re
from dataclasses import dataclass

PART = re.compile(
    r"\\(?:x\{[^}]*\}|[pP]\{[^}]*\}|.)|\[\^?\]?(?:\\.|\[:\w+:\]|[^\]\\])*\]|\(\?(?:P?<\w+>|:)|\{\d*,?\d*\}|.", re.DOTALL
)
QUANTIFIER = re.compile(r"\{(\d*)(,?)(\d*)\}")
SIMPLE = {"*": (0, None), "+": (1, None), "?": (0, 1)}
SPACES = (r"\s", " ", r"\n", r"\t", r"[ \t]", r"[\s]")
BEYOND = r"\x{80}-\x{10FFFF}"  # characters of more bytes than one
ENOUGH = 24  # characters that text should have before lists of it get shorter
LONGEST = 1 << 16


@dataclass
class _Item:
    """An atom, and how often it stands there."""

    atom: str | _Group
    least: int = 1
    most: int | None = 1  # None: without an end
    lazy: bool = False


@dataclass
class _Group:
    """Alternatives in parentheses."""

    opening: str
    alternatives: list[list[_Item]]


def bounded_regex(pattern: str, characters: int, *, ascii_only: bool = False) -> str:
    """`pattern` with repeats so short that what matches has at most about `characters`; least numbers are kept.

    White space that may go on stands once. Repeats of one or two characters are text, and get the same greatest length,
    those of more are lists, which get shorter where text would have fewer than 24 characters. A pattern whose
    parentheses do not match comes back as it is.
    """
    parts = PART.findall(pattern)
    assert "".join(parts) == pattern, "every character is in one part"
    whole, end = _alternatives(parts, 0)
    if end != len(parts):
        return pattern
    length = 1
    for items in (32, 16, 8, 4, 2, 1):
        length = _longest(whole, items, characters)
        if length >= ENOUGH:
            break
    return _written(whole, length, items, ascii_only)


def _longest(whole: _Group, items: int, characters: int) -> int:
    """The greatest length of text with which the whole fits, at least 1."""
    low, high = 1, max(1, characters)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if _width(whole, middle, items) <= characters else (low, middle - 1)
    return low


def _width(atom: str | _Group, length: int, items: int) -> int:
    """Characters that it matches at most."""
    if isinstance(atom, str):
        return 0 if atom in ("^", "$", r"\b", r"\A", r"\z", r"\Z") else 1
    return max(
        sum(_times(item, length, items)[1] * _width(item.atom, length, items) for item in one)
        for one in atom.alternatives
    )


def _times(item: _Item, length: int, items: int) -> tuple[int, int]:
    """How often an item may stand there at least and at most."""
    if item.most == item.least:
        return item.least, item.least
    if item.atom in SPACES:
        limit = 1
    else:
        limit = length if _width(item.atom, 1, 1) <= 2 else items
    return item.least, max(item.least, min(limit, LONGEST if item.most is None else item.most))


def _written(atom: str | _Group, length: int, items: int, ascii_only: bool) -> str:
    if isinstance(atom, str):
        if ascii_only and atom.startswith("[^"):
            return atom[:-1] + BEYOND + "]"
        return "[ -~]" if ascii_only and atom == "." else atom
    alternatives = "|".join(
        "".join(_written(item.atom, length, items, ascii_only) + _quantifier(item, length, items) for item in one)
        for one in atom.alternatives
    )
    return f"{atom.opening}{alternatives})" if atom.opening else alternatives


def _quantifier(item: _Item, length: int, items: int) -> str:
    least, most = _times(item, length, items)
    if least == most == 1:
        return ""
    return f"{{{least},{most}}}" + ("?" if item.lazy else "")


def _alternatives(parts: list[str], start: int, opening: str = "") -> tuple[_Group, int]:
    """What stands from `start` to the parenthesis that closes it, and the place of that."""
    group, place = _Group(opening, [[]]), start
    while place < len(parts) and parts[place] != ")":
        part, own = parts[place], group.alternatives[-1]
        if part == "|":
            group.alternatives.append([])
        elif part == "(" or part.startswith("(?"):
            inner, place = _alternatives(parts, place + 1, part)
            own.append(_Item(inner))
        elif own and (times := _counted(part)) is not None:
            if part == "?" and place and _counted(parts[place - 1]) is not None and not own[-1].lazy:
                own[-1].lazy = True
            else:
                own[-1].least, own[-1].most = times
        else:
            own.append(_Item(part))
        place += 1
    return group, place


def _counted(part: str) -> tuple[int, int | None] | None:
    """What a quantifier says; None for other parts."""
    if part in SIMPLE:
        return SIMPLE[part]
    found = QUANTIFIER.fullmatch(part)
    if found is None or not (found[1] or found[3]):
        return None
    least = int(found[1] or 0)
    return least, (int(found[3]) if found[3] else None) if found[2] else least
