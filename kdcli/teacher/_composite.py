"""The interface of teachers made of teachers: what happens to one happens to each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from kdcli.api import Engine, Student, Teacher, Whole


class Composite(Teacher):
    """`parts` are the teachers inside, by their place in the config below this one (`teachers.coder`, `reference`)."""

    parts: Mapping[str, Teacher]

    def load(self, device: torch.device) -> None:
        self.load_tokenizer()
        for one in self.parts.values():
            one.load(device)

    def place(self, engine: Engine) -> None:
        for one in self.parts.values():
            one.place(engine)

    def follow(self, student: Student) -> None:
        for one in self.parts.values():
            one.follow(student)

    def after_step(self, student: Student, step: int, whole: Whole) -> None:
        for one in self.parts.values():
            one.after_step(student, step, whole)

    def state_dict(self) -> dict[str, Any]:
        return {name: state for name, one in self.parts.items() if (state := one.state_dict())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, one in self.parts.items():
            one.load_state_dict(state.get(name, {}))


def asks_for_all_ranks(teacher: Teacher) -> bool:
    """Whether a teacher may run on all ranks together only, so that each must call it equally often: it took the
    engine when it was placed."""
    if isinstance(teacher, Composite):
        return any(map(asks_for_all_ranks, teacher.parts.values()))
    return type(teacher).place is not Teacher.place
