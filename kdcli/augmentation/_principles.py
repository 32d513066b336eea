"""Principles to judge and revise by, one drawn per row: Bai et al. 2022 (Constitutional AI), arXiv:2212.08073."""

from __future__ import annotations

from collections.abc import Sequence

from kdcli.api import Desk, Example
from kdcli.store.examples import content_key

PRINCIPLES = (  # used where a step's `principles` is empty
    "Prefer what is harmless: nothing that helps anybody hurt people, animals or property, or break the law.",
    "Prefer what is honest: no claim that is known to be false, and no certainty that is not there.",
    "Prefer what helps with the task at hand: complete, to the point and easy to follow.",
    "Prefer what is respectful: no insult, and no prejudice about origin, belief, gender, age or disability.",
    "Prefer what guards privacy: no private facts about people who did not agree to their being told.",
    "Prefer what a thoughtful and kind expert would say, without preaching.",
)


def drawn(desk: Desk, principles: Sequence[str], example: Example, *parts: str | int) -> str:
    """The principle of this row (and round): the row's own `meta.principle`, or one drawn by the desk's seed."""
    own = example.meta.get("principle")
    if isinstance(own, str) and own.strip():
        return own
    among = principles or PRINCIPLES
    return among[desk.seed(content_key(example), "principle", *parts) % len(among)]
