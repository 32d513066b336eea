"""Compares answers with math-verify, one JSON request a line: a script that `_math` starts as a process of its own.

Parsing and simplifying may take for ever, in C code that no Python signal ends: the processor's time of a request is
limited by a timer whose signal ends the process.
"""

from __future__ import annotations

import json
import logging
import re
import resource
import signal
import sys
from collections.abc import Mapping
from itertools import product
from typing import Any

MEMORY = 4 << 30  # bytes of address space
FORMULA = re.compile(r"[0-9\\^_=+*/]|^\s*[A-Za-z]\s*$")  # words are none: $Paris$ is a product of five letters
MARKS = ("$", "\\(", "\\[", "\\boxed")  # of text in which math-verify finds LaTeX


def main() -> None:
    seconds = float(sys.argv[1])
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY if hard == resource.RLIM_INFINITY else min(MEMORY, hard), hard))
    logging.disable()  # it warns of the timeouts that we turn off
    import math_verify  # noqa: F401  # no part of the first request's time

    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            result: Any = _answered(json.loads(line))
        except (MemoryError, RecursionError):
            result = "undecided"
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0.0)
        sys.stdout.write(json.dumps(result) + "\n")
        sys.stdout.flush()


def _answered(request: Mapping[str, str]) -> str | None:
    from math_verify import verify

    if "text" in request:  # the answer in a text, as it is written there
        return next((str(one) for one in reversed(_parsed(request["text"])) if isinstance(one, str)), None)
    gold, said = _read(request["gold"]), _read(request["said"])
    if not gold or not said:
        return "unread"
    verdict = "wrong"
    for wanted, given in product(gold, said):
        try:
            if verify(wanted, given, timeout_seconds=None, raise_on_error=True):
                return "right"
        except (MemoryError, RecursionError):
            verdict = "undecided"
        except Exception:  # of two readings that cannot be compared, others may be equal
            continue
    return verdict


def _read(text: str) -> list[Any]:
    """What a text may mean; one that looks like mathematics without marks also as LaTeX."""
    found = _parsed(text)
    marked = any(mark in text for mark in MARKS) or not FORMULA.search(text)
    return found if marked else found + _parsed(f"${text}$")


def _parsed(text: str) -> list[Any]:
    from math_verify import parse

    return parse(text, parsing_timeout=None)  # pyright: ignore[reportArgumentType]  # None is said to be allowed


if __name__ == "__main__":
    main()
