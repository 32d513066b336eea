"""What steps that ask share: rows in order, `only` in place, further attempts, reasons."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kdcli.api import Answer, Example, Request
from kdcli.augmentation._asking import HELD, Asking, filled
from kdcli.errors import ConfigError
from tests.desks import FakeDesk, run

FILE = """
paper: "none: ours"
user: "Say {{ prompt }}"
parse: {kind: regex, pattern: "good (?P<response>.+)"}
example: good day
"""


class Echo(Asking):
    """One row per reply."""

    def made(self, example: Example, replies: Any) -> Iterator[Example]:
        for reply in replies:
            yield filled(example, reply.records[0], reply.written)


@pytest.fixture
def prompt(tmp_path: Path) -> str:
    file = tmp_path / "say.yaml"
    file.write_text(FILE)
    return str(file)


def rows(count: int, **fields: Any) -> list[Example]:
    return [Example(prompt=f"q{i}", meta={"i": i}, **fields) for i in range(count)]


def say(request: Request) -> str:
    return "good " + request.messages[-1]["content"].removeprefix("Say ")


def test_rows_for_which_only_is_false_pass_unchanged_in_their_place(prompt: str) -> None:
    given = rows(20)
    made = run(Echo(prompt=prompt, only="meta.i is divisibleby 3"), given, say)
    assert [row.meta["i"] for row in made] == list(range(20))
    assert [row.response for row in made] == [f"q{i}" if i % 3 == 0 else None for i in range(20)]
    assert all(row is old for row, old in zip(made, given, strict=True) if old.meta["i"] % 3)


def test_only_streams_and_does_not_gather_rows_that_pass(prompt: str) -> None:
    """Of endlessly many rows that pass, the first comes out."""

    def endless() -> Iterator[Example]:
        while True:
            yield Example(prompt="x")

    step = Echo(prompt=prompt, only="prompt == 'never'")
    step.open(FakeDesk(say))
    out = step(endless())
    assert [next(out).prompt for _ in range(3 * HELD)] == ["x"] * 3 * HELD


@pytest.mark.parametrize("attempts", [1, 3])
def test_asking_streams(prompt: str, attempts: int) -> None:
    """The first row is out before the last is read, with further attempts too."""
    read = []

    def source() -> Iterator[Example]:
        for row in rows(3 * HELD):
            read.append(row)
            yield row

    step = Echo(prompt=prompt, attempts=attempts)
    step.open(FakeDesk(say))
    next(iter(step(source())))
    assert len(read) <= HELD


def test_an_unknown_name_in_only_is_a_config_error(prompt: str) -> None:
    with pytest.raises(ConfigError, match=r"echo\.only names scor, which no row has"):
        Echo(prompt=prompt, only="scor > 3")
    with pytest.raises(ConfigError, match=r"echo\.only.*is no expression"):
        Echo(prompt=prompt, only="score >")


def test_a_row_that_lacks_what_only_names_is_set_aside(prompt: str) -> None:
    step = Echo(prompt=prompt, only="meta.j > 3")
    assert run(step, rows(2), say) == []
    assert step.desk.reasons == ["lacks a field"] * 2  # type: ignore[attr-defined]
    assert len(run(Echo(prompt=prompt, only="meta.j is defined and meta.j > 3"), rows(2), say)) == 2


class Stubborn:
    """Says nothing of use until it is asked with another seed for the `good`-th time."""

    def __init__(self, good: int) -> None:
        self.good = good
        self.seen: dict[str, list[int]] = {}

    def __call__(self, request: Request) -> list[str]:
        seeds = self.seen.setdefault(request.messages[-1]["content"], [])
        seeds.append(request.seed)
        first = "bad" if len(seeds) < self.good else "good 0"
        return [first, *(f"good {i}" for i in range(1, request.n))]


@pytest.mark.parametrize(("attempts", "good", "kept"), [(1, 1, 4), (1, 2, 0), (2, 2, 4), (3, 3, 4), (2, 3, 0)])
def test_a_text_that_does_not_parse_is_asked_for_again_with_another_seed(
    prompt: str, attempts: int, good: int, kept: int
) -> None:
    answers = Stubborn(good)
    step = Echo(prompt=prompt, attempts=attempts)
    made = run(step, rows(4), answers)
    assert [row.meta["i"] for row in made] == list(range(kept))
    assert step.desk.reasons == ["no match"] * (4 - kept)  # type: ignore[attr-defined]
    for seeds in answers.seen.values():
        assert len(seeds) == len(set(seeds)) == min(attempts, good)


def test_only_the_samples_of_no_use_are_asked_for_again(prompt: str) -> None:
    class Three(Echo):
        def asked(self, examples: Iterable[Example], **settings: Any) -> Any:
            return super().asked(examples, n=3)

    step = Three(prompt=prompt, attempts=2)
    made = run(step, rows(1), Stubborn(2))
    assert [row.response for row in made] == ["0", "1", "2"]
    assert [request.n for _, request in step.desk.asked] == [3, 1]  # type: ignore[attr-defined]


def test_cut_texts_are_asked_for_again_and_refusals_and_failures_are_not(prompt: str) -> None:
    for answer, calls, reason in (
        (Answer(texts=["good"], finished=["length"]), 3, "cut off at max_tokens"),
        (Answer(texts=["good day"], finished=["refusal"]), 1, "refused by the writer"),
        (Answer(failed="HTTP 500", detail="three times"), 1, "HTTP 500"),
    ):
        step = Echo(prompt=prompt, attempts=3)
        assert run(step, rows(1), lambda request, answer=answer: answer) == []
        assert step.desk.reasons == [reason]  # type: ignore[attr-defined]
        assert len(step.desk.asked) == calls  # type: ignore[attr-defined]


def test_a_cut_text_is_kept_where_that_is_allowed(prompt: str) -> None:
    cut = Answer(texts=["good morn"], finished=["length"])
    assert run(Echo(prompt=prompt, allow_truncated=True), rows(1), lambda _: cut)[0].response == "morn"


def test_what_is_set_aside_stands_in_the_order_of_the_rows(prompt: str) -> None:
    """Whether a row lacks a field (known before it is asked about) or its answer is of no use (known after)."""
    given = [Example(prompt=f"q{i}") if i % 2 else Example(text=f"t{i}") for i in range(10)]
    step = Echo(prompt=prompt)
    assert run(step, given, lambda _: "bad") == []
    assert [row for row, _ in step.desk.set_aside] == given  # type: ignore[attr-defined]
    assert step.desk.reasons == ["lacks a field", "no match"] * 5  # type: ignore[attr-defined]


def test_attempts_below_one_are_refused(prompt: str) -> None:
    with pytest.raises(ConfigError, match="give 1 or more"):
        Echo(prompt=prompt, attempts=0)
