"""Programs in answers: which text is the program, and what a block of them does in the sandbox, remembered."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from kdcli.api import Desk
from kdcli.augmentation._once import once
from kdcli.augmentation._sandbox import Ran, in_order, run_python

FENCE = re.compile(r"```[ \t]*([\w+-]*)[^\n]*\n(.*?)(?:```|\Z)", re.DOTALL)
PYTHON = ("", "python", "py", "python3")


def program_in(text: str) -> str | None:
    """The last fenced block of Python; a text without any fence is a program itself; None where others are fenced."""
    blocks = FENCE.findall(text)
    if not blocks:
        return text if text.strip() else None
    return next((code for kind, code in reversed(blocks) if kind.lower() in PYTHON and code.strip()), None)


def run_all(desk: Desk, programs: Sequence[tuple[str, str]], limits: Mapping[str, Any]) -> list[Ran]:
    """What each (program, standard input) does, on all processors; `limits` are settings of `run_python`. What ran once
    is not run again: a program that prints the time, or draws numbers, has printed what it printed."""

    def act(job: tuple[str, str]) -> Ran:
        return run_python(job[0], stdin=job[1], **limits)

    def compute(missing: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
        return [vars(ran) for _, ran in in_order(missing, act)]

    return [Ran(**value) for value in once(desk, f"program {sorted(limits.items())}", programs, compute)]
