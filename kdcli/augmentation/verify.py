"""Answers held against what is known: gold answers (math-verify), choices, unit tests or a program's output."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import xxhash

from kdcli.api import Desk, Example, Transform
from kdcli.augmentation import _sandbox
from kdcli.augmentation._answers import Answers, normal
from kdcli.augmentation._asking import blocks
from kdcli.augmentation._once import once
from kdcli.augmentation._programs import program_in, run_all
from kdcli.augmentation._sandbox import Ran, in_order
from kdcli.augmentation._sifting import text_of
from kdcli.errors import ConfigError
from kdcli.store.examples import BadRow
from kdcli.text.prompt import rendered, template, variables

METHODS = ("answer", "exact", "choice", "tests", "program")
Finding = tuple[str, str]  # a short reason to count by, and a sentence; ("", "") where the answer is right
RIGHT: Finding = ("", "")


class Verify(Transform):
    """Keeps rows whose response is right, or with `mark` keeps all and writes meta.correct.

    `answer`, `exact`, `choice`: the answer in the response (`extract`: see `Answers`) against `gold`, a Jinja template.
    `tests`: the response's code, then the tests in meta.tests (code, or a list of lines of it), in the sandbox; it is
    right where the tests come to their end. That is no proof against code that means to deceive its tests.
    `program`: what the response's program prints, given `stdin`, against `gold`: line by line, numbers to 1e-6.

    A row without what it is held against is set aside; with `mark` it passes without a mark.
    """

    def __init__(
        self,
        *,
        method: Literal["answer", "exact", "choice", "tests", "program"] = "answer",
        gold: str = "{{ meta.answer }}",
        stdin: str | None = None,
        extract: str | None = None,
        mark: bool = False,
        seconds: float = 5.0,
        memory_mib: int = 512,
        packages: bool = False,
    ) -> None:
        if method not in METHODS:
            raise ConfigError(f"augmentation: verify.method: is {method!r}; choose one of {', '.join(METHODS)}")
        if not seconds > 0 or memory_mib < 32:
            raise ConfigError("augmentation: verify: give seconds above 0, and at least 32 MiB of memory")
        self.method = method
        self.gold = template(gold, where="augmentation: verify.gold")
        self.stdin = None if stdin is None else template(stdin, where="augmentation: verify.stdin")
        self.runs = method in ("tests", "program")
        self.answers = None if self.runs else Answers(method, extract, where="augmentation: verify")  # pyright: ignore
        self.settings = repr((method, extract))
        self.mark = mark
        self.limits = {"seconds": seconds, "memory_mib": memory_mib, "packages": packages}

    def open(self, desk: Desk) -> None:
        super().open(desk)
        if self.runs:
            _sandbox.layers()  # raises before anything is paid for

    def __call__(self, examples: Iterable[Example]) -> Iterator[Example]:
        for block in blocks(examples, 64):
            for example, finding in zip(block, self._findings(block), strict=True):
                yield from self._kept(example, finding)

    def _kept(self, example: Example, finding: Finding | None) -> Iterator[Example]:
        """The row, marked or not, or nothing after it was set aside. None: nobody can tell, and marks are wanted."""
        if finding is None:
            yield example
        elif self.mark:
            yield replace(example, meta={**example.meta, "correct": finding == RIGHT})
        elif finding == RIGHT:
            yield example
        else:
            self.desk.aside(example, *finding)

    def _findings(self, block: Sequence[Example]) -> list[Finding | None]:
        if self.desk.rehearsal:
            return [RIGHT] * len(block)
        asked: list[Any] = []
        found: list[Finding | None] = []
        for example in block:
            try:
                asked.append(self._asked(example))
                found.append(RIGHT)
            except BadRow as error:
                asked.append(None)
                found.append(None if self.mark else (error.reason, str(error)))
        places = [place for place, one in enumerate(asked) if one is not None]
        held = [asked[place] for place in places]
        for place, finding in zip(places, self._ran(held) if self.runs else self._compared(held), strict=True):
            found[place] = finding
        return found

    def _asked(self, example: Example) -> tuple[str, ...]:
        """What is compared or run for a row. Raises BadRow where it has nothing to be held against."""
        response = text_of(example, "response")
        if response is None:
            raise BadRow("lacks a field", "the row has no response to verify")
        if self.method == "tests":
            return response, _tests(example)
        values = variables(example)
        gold = rendered(self.gold, values, "verify.gold").strip()
        if not gold:
            raise BadRow("no gold answer", "verify.gold is empty for this row")
        given = "" if self.stdin is None else rendered(self.stdin, values, "verify.stdin")
        return (response, gold, given) if self.method == "program" else (response, gold)

    # ------------------------------------------------------------------------------------------------ by comparison

    def _compared(self, asked: Sequence[tuple[str, ...]]) -> list[Finding]:
        def compute(missing: Sequence[tuple[str, ...]]) -> list[Finding]:
            return [finding for _, finding in in_order(missing, lambda one: self._finding(*one))]

        return [(reason, detail) for reason, detail in once(self.desk, f"verify {self.settings}", asked, compute)]

    def _finding(self, response: str, gold: str) -> Finding:
        assert self.answers is not None
        said = self.answers.of(response)
        if said is None:
            return "no answer", "no answer was found in the response"
        verdict = self.answers.compare(gold, said)
        if verdict == "undecided":
            return "undecided", "comparing the answers took too long"
        return RIGHT if verdict == "right" else ("wrong answer", "the answer is not the gold answer")

    # ------------------------------------------------------------------------------------------------ by running

    def _ran(self, asked: Sequence[tuple[str, ...]]) -> list[Finding]:
        programs = [program_in(response) for response, *_ in asked]
        jobs = [
            (_tested(program, rest[0]), "") if self.method == "tests" else (program, rest[1])
            for program, (_, *rest) in zip(programs, asked, strict=True)
            if program is not None
        ]
        results = iter(run_all(self.desk, jobs, self.limits))
        found: list[Finding] = []
        for program, (_, *rest) in zip(programs, asked, strict=True):
            if program is None:
                found.append(("no program", "the response has no block of Python"))
            elif self.method == "tests":
                found.append(_passed(next(results), _token(program, rest[0])))
            else:
                found.append(_printed(next(results), rest[0]))
        return found


def _tests(example: Example) -> str:
    tests = example.meta.get("tests")
    if isinstance(tests, str) and tests.strip():
        return tests
    if isinstance(tests, Sequence) and tests and all(isinstance(one, str) for one in tests):
        return "\n".join(tests)
    raise BadRow("no tests", "the row has no meta.tests: code, or a list of lines of code")


def _tested(program: str, tests: str) -> str:
    """The program as an imported module, then the tests, then a word that says that they came to their end."""
    name = "" if "from __future__" in program else '__name__ = "program"\n'
    return f"{name}{program}\n\n{tests}\n\nprint({_token(program, tests)!r})\n"


def _token(program: str, tests: str) -> str:
    return "tests passed " + xxhash.xxh3_64_hexdigest(repr((program, tests)).encode("utf-8", "replace"))


def _passed(ran: Ran, token: str) -> Finding:
    if ran.ok and ran.output.rstrip().endswith(token):
        return RIGHT
    return "tests failed", f"the tests ended with: {ran.why or 'an end of the program before theirs'}"


def _printed(ran: Ran, gold: str) -> Finding:
    if not ran.ok:
        return "program failed", f"the program ended with: {ran.why}"
    said, wanted = ran.output.split("\n"), gold.split("\n")
    lines = [[normal(line) for line in text if line.strip()] for text in (said, wanted)]
    same = len(lines[0]) == len(lines[1]) and all(_same(*pair) for pair in zip(*lines, strict=True))
    return RIGHT if same else ("wrong output", "what the program printed is not the gold output")


def _same(said: str, wanted: str) -> bool:
    try:
        return said == wanted or math.isclose(float(said), float(wanted.replace(",", "")), rel_tol=1e-6, abs_tol=1e-9)
    except ValueError:
        return False
