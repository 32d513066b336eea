"""A frozen reference model beside the teacher: what preference losses (DPO, Rafailov et al. 2023, arXiv:2305.18290)
and penalties of policy gradients hold the student against."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import xxhash

from kdcli.api import Batch, ModelShape, Need, Task, Teacher, TeacherSignal
from kdcli.errors import ConfigError
from kdcli.teacher._composite import Composite


class WithReference(Composite):
    """The signal of `teacher` (null: none) with log pi_ref(target) of `reference`, which reads what the student reads.

    Without this teacher, objectives with a reference take the student as it began. The reference needs the student's
    tokenizer; the teacher may have another. Raises ConfigError for a reference without log-probabilities.
    """

    def __init__(self, *, reference: Teacher, teacher: Teacher | None = None) -> None:
        if Need.LOGPROBS not in reference.provides:
            raise ConfigError(
                f"teacher.reference: {type(reference).__name__} gives no log-probabilities of targets; choose hf"
            )
        self.reference = reference
        self.teacher = teacher
        self.parts = {"reference": reference} | ({} if teacher is None else {"teacher": teacher})
        self.bound = {"reference": reference}  # by its place: whose tokens must be the student's
        self.provides = Need.REFERENCE | (Need.NOTHING if teacher is None else teacher.provides)

    @property
    def model(self) -> Any:
        """The teacher's, for a student that is cut from it."""
        return getattr(self.teacher or self.reference, "model", None)

    def load_tokenizer(self) -> Any:
        """The teacher's, or else the reference's."""
        own = self.reference.load_tokenizer()
        other = None if self.teacher is None else self.teacher.load_tokenizer()
        self.tokenizer = own if other is None else other
        return self.tokenizer

    def load_task(self) -> Task | None:
        return (self.teacher or self.reference).load_task()

    def shape(self) -> ModelShape | None:
        return None if self.teacher is None else self.teacher.shape()

    def fingerprint(self) -> str:
        of = [None if one is None else one.fingerprint() for one in (self.teacher, self.reference)]
        return xxhash.xxh3_128_hexdigest(repr(["with_reference", of]).encode())

    @torch.no_grad()
    def annotate(self, batch: Batch, needs: Need) -> TeacherSignal:
        rest = needs & ~Need.REFERENCE
        signal = TeacherSignal() if self.teacher is None else self.teacher.annotate(batch, rest)
        if Need.REFERENCE not in needs:
            return signal
        own = self.reference.annotate(replace(batch, teacher=None), Need.LOGPROBS)
        assert own.logprobs is not None, "a reference gives log-probabilities"
        return replace(signal, reference_logprobs=own.logprobs)
