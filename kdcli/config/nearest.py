"""Did you mean: the valid word nearest to one that is not."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def nearest(word: str, words: Iterable[str]) -> str | None:
    """The most similar of `words`, or None where none is similar."""
    words = list(words)
    lowered = {w.lower(): w for w in reversed(words)}
    found = get_close_matches(word.lower(), lowered, n=1, cutoff=0.6)
    return lowered[found[0]] if found else None


def suggest(word: str, words: Iterable[str], *, prefix: str = "", limit: int = 12) -> str:
    """The end of an error message: `did you mean X?`, or else what there is to choose from."""
    words = sorted(words)
    match = nearest(word, words)
    if match:
        return f"did you mean {prefix}{match}?"
    if not words:
        return "there is none"
    shown = ", ".join(words[:limit]) + (", …" if len(words) > limit else "")
    return f"there is {shown}"
