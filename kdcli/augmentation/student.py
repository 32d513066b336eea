"""Keeps what the student fails, so that a teacher's answers go where they teach: Jiang et al. 2023 (Lion),
arXiv:2305.12870."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Literal

from kdcli.api import Example, Transform
from kdcli.augmentation._asking import groups
from kdcli.augmentation._ranked import number_of
from kdcli.errors import ConfigError

OWN = ("correct", "by", "share", "lm", "critique", "reason", "rationale", "draft")  # what is said of an answer


class Student(Transform):
    """In each group the rows whose meta.by is `by` are the student's, the others the teacher's.

    `measure` is meta.correct (1 or 0) or the row's score. Without `gap` the student fails where one of its answers is
    not correct, or scores less on average than the teacher's; with it, where the teacher's mean lies at least `gap`
    above the student's. Of a failed group the teacher's rows are kept, or one `prompts` row without an answer.
    """

    def __init__(
        self,
        *,
        by: str = "student",
        measure: Literal["correct", "score"] = "correct",
        gap: float | None = None,
        keep: Literal["teacher", "prompts"] = "teacher",
    ) -> None:
        where = "augmentation: student"
        if measure not in ("correct", "score"):
            raise ConfigError(f"{where}.measure: is {measure!r}; choose correct or score")
        if keep not in ("teacher", "prompts"):
            raise ConfigError(f"{where}.keep: is {keep!r}; choose teacher or prompts")
        self.by = by
        self.measure = measure
        self.gap = gap
        self.keep = keep

    def __call__(self, examples: Iterable[Example]) -> Iterator[Example]:
        for group in groups(examples):
            students = [row for row in group if row.meta.get("by") == self.by]
            teachers = [row for row in group if row.meta.get("by") != self.by]
            found = None if self.desk.rehearsal else self._passes(students, teachers)
            if found is not None:
                for row in group:
                    self.desk.aside(row, *found)
                continue
            yield from self._failed(group, students, teachers)

    def _failed(
        self, group: Sequence[Example], students: Sequence[Example], teachers: Sequence[Example]
    ) -> Iterator[Example]:
        if self.keep == "teacher":
            for row in students:
                self.desk.aside(row, "the student's", "the teacher's answers to this prompt are kept")
            yield from teachers
            return
        first = (teachers or group)[0]
        meta = {name: value for name, value in first.meta.items() if name not in OWN}
        yield replace(first, response=None, messages=None, score=None, group=None, meta=meta)

    def _passes(self, students: Sequence[Example], teachers: Sequence[Example]) -> tuple[str, str] | None:
        """Why a group is not kept; None where the student fails."""
        if not students:
            return "no student answer", f"no row of the group has meta.by={self.by}; put a step rollout before"
        if not teachers and self.keep == "teacher":
            return "no teacher answer", "all rows of the group are the student's; set keep=prompts, or keep them"
        own, theirs = ([self._value(row) for row in rows] for rows in (students, teachers))
        compares = self.gap is not None or self.measure == "score"
        if None in own or (compares and (None in theirs or not theirs)):
            name = "meta.correct" if self.measure == "correct" else "score"
            return "no score", f"a row of the group has no {name}; put a step before that gives it"
        mean, other = _mean(own), _mean(theirs)
        if self.gap is not None:
            fails = other - mean >= self.gap
        else:
            fails = mean < (1.0 if self.measure == "correct" else other)
        return None if fails else ("the student can", "the student's answers are good enough")

    def _value(self, row: Example) -> float | None:
        return number_of(row.meta.get("correct") if self.measure == "correct" else row.score)


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else 0.0
