"""Runs the program in a row and keeps what it printed: Gao et al. 2023 (PAL), arXiv:2211.10435."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Literal

from kdcli.api import Desk, Example, Transform
from kdcli.augmentation import _sandbox
from kdcli.augmentation._asking import blocks
from kdcli.augmentation._programs import program_in, run_all
from kdcli.augmentation._sifting import Field, lacking, text_of
from kdcli.errors import ConfigError


class Execute(Transform):
    """Writes meta.`into` (what the program printed) and meta.error: empty, or why it failed with its traceback's end.

    Rows whose `field` has no program are set aside. Raises ConfigError where the machine cannot run a program safely.
    """

    def __init__(
        self,
        *,
        language: Literal["python"] = "python",
        field: Field = "response",
        into: str = "output",
        seconds: float = 5.0,
        memory_mib: int = 512,
        packages: bool = False,
    ) -> None:
        if language != "python":
            raise ConfigError(f"augmentation: execute.language: is {language!r}; only python is run")
        if not into.isidentifier() or into == "error":
            raise ConfigError(f"augmentation: execute.into: is {into!r}; give a name for meta, other than error")
        if not seconds > 0 or memory_mib < 32:
            raise ConfigError("augmentation: execute: give seconds above 0, and at least 32 MiB of memory")
        self.field: Field = field
        self.into = into
        self.limits = {"seconds": seconds, "memory_mib": memory_mib, "packages": packages}

    def open(self, desk: Desk) -> None:
        super().open(desk)
        _sandbox.layers()  # raises before anything is paid for

    def __call__(self, examples: Iterable[Example]) -> Iterator[Example]:
        for block in blocks(examples, 64):
            if self.desk.rehearsal:
                yield from (self._with(example, "", "") for example in block)
                continue
            chosen = []
            for example in block:
                text = text_of(example, self.field)
                program = None if text is None else program_in(text)
                if text is None:
                    self.desk.aside(example, *lacking(self.field))
                elif program is None:
                    self.desk.aside(example, "no program", f"{self.field} has no block of Python")
                else:
                    chosen.append((example, program))
            jobs = [(program, "") for _, program in chosen]
            for (example, _), ran in zip(chosen, run_all(self.desk, jobs, self.limits), strict=True):
                yield self._with(
                    example, ran.output.rstrip(), "" if ran.ok else f"{ran.why}\n{ran.error[-2000:]}".strip()
                )

    def _with(self, example: Example, output: str, error: str) -> Example:
        return replace(example, meta={**example.meta, self.into: output, "error": error})
