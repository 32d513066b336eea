"""ROUGE-L between many texts: Lin 2004 (aclanthology.org/W04-1013), F1 of the longest common subsequence of words."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence

from kdcli.augmentation._sifting import words

Words = Sequence[str]


def rouge_l(first: Words, second: Words) -> float:
    """2 LCS / (m + n) of texts of m and n words, which is F1 of LCS / m and LCS / n; 0 if one is empty."""
    return 2 * longest_common_subsequence(first, second) / (len(first) + len(second)) if first and second else 0.0


def longest_common_subsequence(first: Words, second: Words) -> int:
    """Its length, with a column of the table in the bits of one number (Hyyrö 2004): m n / 64 steps."""
    where: defaultdict[str, int] = defaultdict(int)
    for place, word in enumerate(first):
        where[word] |= 1 << place
    full = (1 << len(first)) - 1
    rest = full
    for word in second:
        if matches := where.get(word, 0):
            taken = rest & matches
            rest = ((rest + taken) | (rest - taken)) & full
    return len(first) - rest.bit_count()


class RougeL:
    """Finds texts whose ROUGE-L with an added one is at least `threshold`, exactly.

    Of texts with LCS L and m <= n words, 2 L / (m + n) >= t needs L >= t (m + n) / 2, and L <= m, so that two such
    texts share at least t m / (2 - t) words (t n / (2 - t), too). Words are ordered by length, the longest first, as
    they are the rarest: of two sets in one order that share at least s elements, the first |A| - s + 1 of each have
    one in common, so only those are looked up and indexed (Bayardo et al. 2007, prefix filtering); and of what stands
    behind them, at most all of the longer rest is shared, too (Xiao et al. 2008, positional filtering).
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self._texts: list[tuple[str, ...]] = []
        self._counts: list[Counter[str]] = []
        self._rests: list[int] = []  # words behind the indexed ones
        self._index: defaultdict[tuple[str, int], list[int]] = defaultdict(list)

    def find(self, text: str) -> tuple[int, float] | None:
        """The number of the most similar added text (the first of equals) and ROUGE-L, if it reaches the threshold."""
        found = tuple(words(text))
        counts = Counter(found)
        prefix = self._prefix(found)
        rest = len(found) - len(prefix)
        hits: Counter[int] = Counter()
        for key in prefix:
            hits.update(self._index.get(key, ()))
        best: tuple[int, float] | None = None
        for number in sorted(hits):
            other = self._texts[number]
            least = self._least(len(found) + len(other))
            if hits[number] + max(rest, self._rests[number]) < least or min(len(found), len(other)) < least:
                continue
            if (counts & self._counts[number]).total() < least:
                continue
            similarity = rouge_l(found, other)
            if similarity >= self.threshold and (best is None or similarity > best[1]):
                best = number, similarity
        return best

    def add(self, text: str) -> int:
        """Its number: 0, 1, 2, …"""
        found = tuple(words(text))
        prefix = self._prefix(found)
        for key in prefix:
            self._index[key].append(len(self._texts))
        self._rests.append(len(found) - len(prefix))
        self._texts.append(found)
        self._counts.append(Counter(found))
        return len(self._texts) - 1

    def _least(self, total: int) -> int:
        """The LCS that texts of so many words together need."""
        return math.ceil(self.threshold * total / 2 - 1e-9)

    def _prefix(self, found: Words) -> list[tuple[str, int]]:
        """The words that one of a similar text must be among; the n-th of equal words is an element of its own."""
        shared = math.ceil(self.threshold * len(found) / (2 - self.threshold) - 1e-9)
        seen: Counter[str] = Counter()
        elements: list[tuple[str, int]] = []
        for word in found:
            elements.append((word, seen[word]))
            seen[word] += 1
        elements.sort(key=lambda element: (-len(element[0]), element))
        return elements[: len(elements) - max(shared, 1) + 1]
