"""Final answers: where a text gives one, and whether two are the same."""

from __future__ import annotations

import re
import unicodedata
from typing import Literal

from kdcli.augmentation._math import shared
from kdcli.errors import ConfigError

Method = Literal["answer", "exact", "choice"]
NAMED = re.compile(r"answer(?:\s+is|\s*:)*[\s*(\[]*(?:\\boxed\{)?[\s*(\[]*(?-i:([A-J]))(?![\w'])", re.IGNORECASE)
LETTERS = (
    NAMED,
    re.compile(r"\\boxed\{\s*(?:\\text\{)?\s*\(?([A-J])\)?\s*\}"),
    re.compile(r"\(([A-J])\)"),
    re.compile(r"^\W*([A-J])(?:[).:]|\W*$)", re.MULTILINE),
    re.compile(r"\b([B-HJ])\b"),  # A and I are words
)


class Answers:
    """`answer`: mathematics, by math-verify; `exact`: text, whatever its case, spaces and last full stop; `choice`: a
    letter A to J. `extract` is a regex whose last match in a text is the answer (its first group, where it has one).

    Raises ConfigError for a broken regex, or without math-verify where it is needed.
    """

    def __init__(self, method: Method, extract: str | None, *, where: str) -> None:
        if method not in ("answer", "exact", "choice"):
            raise ConfigError(f"{where}.method: is {method!r}; choose answer, exact or choice")
        try:
            self.pattern = None if extract is None else re.compile(extract, re.DOTALL | re.MULTILINE)
        except re.error as error:
            raise ConfigError(f"{where}.extract: {extract!r} is no regex: {error}") from None
        self.method = method
        self.math = shared() if method == "answer" else None

    def of(self, text: str) -> str | None:
        """The answer that a text gives, or None."""
        if self.pattern is not None:
            found = list(self.pattern.finditer(text))
            text = (found[-1][1] if self.pattern.groups else found[-1][0]) or "" if found else ""
        if self.method == "choice":
            return letter(text)
        if self.method == "answer" and self.pattern is None:
            assert self.math is not None
            return self.math.answer(text)
        return text.strip() or None

    def compare(self, gold: str, said: str) -> str:
        """`right`, `wrong`, or `undecided` where mathematics took too long."""
        same = "right" if normal(gold) == normal(said) else "wrong"
        if self.method == "choice":
            return "right" if (letter(gold) or gold.strip().upper()) == said else "wrong"
        if self.math is None or same == "right":
            return same
        verdict = self.math.compare(gold, said)
        return same if verdict == "unread" else verdict


def letter(text: str) -> str | None:
    """The letter that a text chooses: the last one named as the answer, boxed, in brackets, at the beginning of a
    line, or alone, in that order of trust."""
    for pattern in LETTERS:
        if found := pattern.findall(text):
            return found[-1]
    return None


def normal(text: str) -> str:
    """Compatible characters as one, lower case, single spaces, no white space, quotes or full stop around it."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).strip("\"'` ").rstrip(".").rstrip()
