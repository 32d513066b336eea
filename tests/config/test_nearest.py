"""Did you mean."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kdcli.config.nearest import nearest, suggest

WORDS = ["temperature", "weight", "domains", "label_smoothing", "temperature_scale", "beta"]


@given(st.sampled_from(WORDS), st.data())
def test_one_slip_of_a_long_word_is_understood(word: str, data: st.DataObject) -> None:
    """A letter dropped, doubled or two swapped, in words of at least six letters."""
    if len(word) < 6:
        return
    at = data.draw(st.integers(0, len(word) - 2))
    slips = [word[:at] + word[at + 1 :], word[:at] + word[at] + word[at:]]
    slips.append(word[:at] + word[at + 1] + word[at] + word[at + 2 :])
    for slip in slips:
        assert nearest(slip, WORDS) == word


def test_case_does_not_matter_and_the_exact_word_wins() -> None:
    assert nearest("Temperature", WORDS) == "temperature"
    assert all(nearest(word, WORDS) == word for word in WORDS)


def test_what_resembles_nothing_gets_the_list() -> None:
    assert nearest("zzz", WORDS) is None
    assert suggest("zzz", ["a", "b"]) == "there is a, b"
    assert suggest("temprature", WORDS, prefix="objective.kd.") == "did you mean objective.kd.temperature?"
    assert suggest("x", []) == "there is none"
