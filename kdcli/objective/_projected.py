"""The interface of losses of one hidden state against another, after a learned map where their widths differ."""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal, Unpack

import torch
from torch import Tensor, nn

from kdcli.api import Batch, ModelShape, StudentOutput, TeacherSignal, TokenSettings
from kdcli.objective._layers import Layered, Layers, spread, upcast
from kdcli.objective._learned import load_learned
from kdcli.ops.chunked import map_chunks

CHUNK = 1024  # targets whose float32 copies exist at once


class Projected(Layered):
    """Mean over pairs of layers of d(W h_s, h_t) at each target, W [D_t, D_s] without bias and one per pair.

    `project`: `auto` learns W where the widths differ, `always` also where they do not. W begins by Xavier's uniform
    rule from `seed`, or as `init` (a run's folder, or its objectives/TERM.safetensors) has it. It is learned with the
    student, at the same rate, and saved as `projector.STUDENT_TEACHER`.
    """

    def __init__(
        self,
        *,
        layers: Layers = "uniform",
        project: Literal["auto", "always"] = "auto",
        init: str | None = None,
        seed: int = 0,
        **settings: Unpack[TokenSettings],
    ) -> None:
        super().__init__(layers=layers, **settings)
        self.project = project
        self.init = init
        self.seed = seed
        self.projector = nn.ParameterDict()  # "3_6": of student layer 3 and teacher layer 6
        self.zero_at_teacher = project == "auto"

    @abstractmethod
    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Float states [C, D] of one width -> [C]."""

    def fit(self, student: ModelShape, teacher: ModelShape | None) -> None:
        super().fit(student, teacher)
        assert teacher is not None, "Layered.fit refuses it"
        if student.width == teacher.width and self.project == "auto":
            return
        generator = torch.Generator().manual_seed(self.seed)
        for pair in self.pairs(student.layers, teacher.layers):
            weight = torch.empty(teacher.width, student.width)
            self.projector[_name(pair)] = nn.Parameter(nn.init.xavier_uniform_(weight, generator=generator))
        if self.init is not None:
            load_learned(dict(self.named_parameters()), self.init, f"{type(self).__name__}: init")

    def forward(self, batch: Batch, student: StudentOutput, teacher: TeacherSignal) -> Tensor:
        ours, theirs = student.hidden_states, teacher.hidden_states
        assert ours is not None and theirs is not None, "it needs HIDDEN"
        pairs = self.pairs(len(ours) - 1, len(theirs) - 1)
        total = sum(self._pair(pair, ours[pair[0]][batch.mask], theirs[pair[1]][batch.mask]) for pair in pairs)
        assert isinstance(total, Tensor), "there is at least one pair"
        return spread(total / len(pairs), batch.mask)

    def _pair(self, pair: tuple[int, int], student: Tensor, teacher: Tensor) -> Tensor:
        weight = self.projector.get(_name(pair))

        def values(student: Tensor, teacher: Tensor) -> Tensor:
            student = upcast(student)
            if weight is not None:
                student = nn.functional.linear(student, weight.to(student.dtype))
            return self.compare(student, upcast(teacher))

        return map_chunks(values, CHUNK, student, teacher)


def _name(pair: tuple[int, int]) -> str:
    return f"{pair[0]}_{pair[1]}"
