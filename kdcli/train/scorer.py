"""The model in training, as evaluations see it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from kdcli.api import Batch, Engine, Scores, Subject
from kdcli.train.interrupt import Interrupt


class StopScoring(Exception):
    """A signal came while an evaluation ran; every rank has agreed to stop."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.signal_number = signal_number


class Scorer(Subject):
    """Scores on the CPU. Between two calls all ranks may agree to stop: StopScoring."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Any,
        interrupt: Interrupt,
        folder: Path = Path(),
        reading: Mapping[str, Any] | None = None,
    ) -> None:
        self.engine = engine
        self.folder = folder
        self.reading = reading or {}
        self.tokenizer = tokenizer
        self.rank, self.world_size = engine.rank, engine.world_size
        self.interrupt = interrupt

    def score(self, batch: Batch, *, teacher: bool = True) -> Scores:
        """Of the student alone unless `teacher`."""
        self.check()
        scores: Scores = self.engine(batch.to(self.engine.device), mode="score", teacher=teacher)
        values = {f.name: getattr(scores, f.name) for f in fields(scores)}
        return replace(scores, **{name: value.cpu() for name, value in values.items() if isinstance(value, Tensor)})

    def check(self) -> None:
        """Raises StopScoring, on every rank, when one was asked to stop. A collective."""
        signal_number = max(self.engine.gather(self.interrupt.received))
        if signal_number:
            raise StopScoring(signal_number)

    def sum(self, values: Mapping[str, float]) -> dict[str, float]:
        return self.engine.sum(values)
