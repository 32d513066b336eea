"""What held-out rows say of each domain, for schedulers: losses of both models, their KL, the gradients' alignment."""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from kdcli.api import Batch, DomainLoss, Engine, Need, Teacher
from kdcli.errors import ConfigError
from kdcli.store import atomic
from kdcli.store.fault import fault
from kdcli.text.vocabulary import token_keys
from kdcli.train.alignment import alignments
from kdcli.train.distiller import Distiller
from kdcli.train.heldout import HeldOut
from kdcli.train.scorer import Scorer

CONSTANT = frozenset({"teacher", "teacher_per_byte"})  # what training does not change
OF_TEACHER = CONSTANT | {"kl"}
PROBED = OF_TEACHER | {"student", "student_per_byte", "alignment"}  # the fields of DomainLoss that need a probe


class Probe:
    """Scores held-out rows, a micro-batch on each rank at a time, and returns what `signals` ask for:

        student, teacher   nats per target; the worse answer of a pair does not count
        ..._per_byte       where the tokenizers differ, in place of `teacher`: nats of the stretches of text that both
                           cut alike, over their bytes (an end token has nats and no bytes)
        kl                 KL(teacher || student), nats per target
        alignment          of the domain's gradient with those of the others (kdcli.train.alignment)

    Perplexities are over each model's own vocabulary. The student is scored unless only the teacher's half is asked for
    (its `student` is nan then: the scheduler goes by training losses). The teacher's half is computed
    once and kept, in `teacher` and in `file`, with what it depends on; after that the teacher runs for `kl`, and for
    `alignment` if the objectives need it.
    """

    def __init__(
        self,
        held_out: HeldOut,
        signals: frozenset[str],
        *,
        distiller: Distiller,
        engine: Engine,
        scorer: Scorer,
        file: Path,
        source: str = "",
    ) -> None:
        self.held_out = held_out
        self.signals = signals & PROBED
        self.scores_student = not self.signals <= CONSTANT
        self.distiller, self.engine, self.scorer = distiller, engine, scorer
        self.file, self.source = file, source  # `source`: what the teacher's half depends on besides the rows
        self.foreign = distiller.foreign and bool(self.signals & OF_TEACHER)
        self.teacher: dict[str, dict[str, float]] | None = None  # domain -> field -> value
        self.seconds = 0.0  # that the last call took

    def __call__(self, step: int) -> dict[str, DomainLoss]:
        """A collective. Raises StopScoring, on every rank, when a signal came; what was begun is forgotten.

        Raises ConfigError for a domain without a target in its held-out rows."""
        began = time.monotonic()
        self.distiller.eval()
        try:
            if self.teacher is None and self.signals & OF_TEACHER:
                self.teacher = self._read() or self._write(self._score_teacher(step))
            unknown = {"student": dict.fromkeys(self.held_out.rows, math.nan)}
            found = self._score_student(step) if self.scores_student else unknown
            if "alignment" in self.signals:
                found["alignment"] = alignments(self.distiller, self.engine, self.held_out, lambda: self._pause(step))
        finally:
            self.distiller.train()
        self.seconds = time.monotonic() - began
        return {
            name: DomainLoss(**{field: values[name] for field, values in (found | (self.teacher or {})).items()})
            for name in self.held_out.rows
        }

    def _score_student(self, step: int) -> dict[str, dict[str, float]]:
        """Field -> domain -> value."""
        sums = _Sums()
        for batch in self.held_out.batches():
            fault("probe", step=step)
            scores = self.scorer.score(batch, teacher="kl" in self.signals)
            sums.add(batch, "targets", batch.targets_by_sequence())
            sums.add(batch, "student", batch.sum_by_sequence(scores.nll.double()))
            if scores.kl is not None:
                sums.add(batch, "kl", batch.sum_by_sequence(scores.kl.double()))
            if self.foreign:
                aligned = _aligned(batch)
                sums.add(batch, "nats", batch.sum_by_sequence(scores.nll.double() * aligned))
                sums.add(batch, "bytes", batch.sum_by_sequence(self._bytes[batch.targets] * aligned))
        totals = self.scorer.sum(sums)
        fields = {"student": ("student", "targets")}
        fields |= {"kl": ("kl", "targets")} if "kl" in self.signals else {}
        fields |= {"student_per_byte": ("nats", "bytes")} if self.foreign else {}
        return {field: self._ratio(totals, *of) for field, of in fields.items()}

    def _score_teacher(self, step: int) -> dict[str, dict[str, float]]:
        """The same of the teacher alone."""
        sums = _Sums()
        for batch in self.held_out.batches():
            self._pause(step)
            signal = self.distiller.teacher.annotate(batch.to(self.engine.device), Need.LOGPROBS)
            if self.foreign:
                assert signal.own_logprobs is not None, "the teacher gives log-probabilities (`problem_of`)"
                sums.add(batch, "nats", _by_sequence(batch, -signal.own_logprobs.cpu().double()))
                sums.add(batch, "amount", batch.sum_by_sequence(self._bytes[batch.targets] * _aligned(batch)))
            else:
                assert signal.logprobs is not None, "the teacher gives log-probabilities (`problem_of`)"
                sums.add(batch, "nats", batch.sum_by_sequence(-signal.logprobs.cpu().double()))
                sums.add(batch, "amount", batch.targets_by_sequence())
        field = "teacher_per_byte" if self.foreign else "teacher"
        return {field: self._ratio(self.scorer.sum(sums), "nats", "amount")}

    def _ratio(self, totals: Mapping[str, float], of: str, to: str) -> dict[str, float]:
        empty = [name for name in self.held_out.rows if not totals.get(f"{name}/{to}")]
        if empty:
            raise ConfigError(f"probe: the held-out rows of domain {empty[0]} have no {to}; raise probe.rows")
        return {name: totals[f"{name}/{of}"] / totals[f"{name}/{to}"] for name in self.held_out.rows}

    def _pause(self, step: int) -> None:
        fault("probe", step=step)
        self.scorer.check()

    @cached_property
    def _bytes(self) -> Tensor:
        """[V] how many bytes each id of the student stands for."""
        keys = token_keys(self.distiller.student.tokenizer)
        return torch.tensor([float(len(key)) if isinstance(key, bytes) else 0.0 for key in keys])

    # ------------------------------------------------------------------------------------------- the teacher's half

    def _read(self) -> dict[str, dict[str, float]] | None:
        """The teacher's half from `file`, where an earlier attempt left it; rank 0 says."""
        known = None
        if self.engine.rank == 0 and self.file.exists():
            content = json.loads(self.file.read_bytes())
            known = content["teacher"] if content["of"] == self._of else None
        return self.engine.gather(known)[0]

    def _write(self, teacher: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
        if self.engine.rank == 0:
            atomic.write_json(self.file, {"of": self._of, "teacher": teacher})
        return teacher

    @cached_property
    def _of(self) -> str:
        return f"{self.source}-{self.held_out.digest}"


def problem_of(signals: frozenset[str], teacher: Teacher, *, foreign: bool = False) -> str | None:
    """Why a teacher cannot give what signals ask for, as a sentence."""
    needed = Need.LOGPROBS if signals & OF_TEACHER else Need.NOTHING
    needed |= Need.LOGITS if "kl" in signals else Need.NOTHING
    if lacking := needed & ~teacher.provides:
        words = " and ".join(str(flag.name).lower() for flag in lacking)
        return f"it needs the teacher's {words}, which {type(teacher).__name__} does not provide; set teacher=hf"
    if foreign and "kl" in signals:
        return "it reads the KL to the teacher, which exists only where both models have one tokenizer"
    return None


class _Sums(defaultdict[str, float]):
    """DOMAIN/what -> its sum over targets."""

    def __init__(self) -> None:
        super().__init__(float)

    def add(self, batch: Batch, what: str, by_sequence: Tensor) -> None:
        """`by_sequence`: [E]."""
        for name, value in zip(batch.domain, by_sequence.tolist(), strict=True):
            self[f"{name}/{what}"] += value


def _aligned(batch: Batch) -> Tensor:
    """[B, T] bool: targets in a stretch of text that both tokenizers cut alike."""
    assert batch.teacher is not None, "rows are encoded for both tokenizers"
    assert batch.teacher.span is not None, "rows are encoded for both tokenizers"
    return batch.mask & (batch.teacher.span >= 0)


def _by_sequence(batch: Batch, values: Tensor) -> Tensor:
    """[B, T'] of the teacher's targets -> [E]: the sum over each sequence's aligned ones."""
    view, own = batch.teacher, _aligned(batch)
    assert view is not None, "rows are encoded for both tokenizers"
    assert view.span is not None and view.teacher_span is not None, "rows are encoded for both tokenizers"
    sequence = torch.full((2 + int(max(view.span.max(), view.teacher_span.max())),), -1)  # the last one is of no span
    sequence[view.span[own]] = batch.segment[own]
    kept = (view.teacher_span >= 0) & (sequence[view.teacher_span] >= 0)
    return values.new_zeros(batch.num_sequences).index_add(0, sequence[view.teacher_span[kept]], values[kept])
