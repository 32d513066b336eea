"""Task-aware layer-wise distillation: Liang et al. 2023 (TED), arXiv:2210.01351."""

from __future__ import annotations

from typing import Literal, Unpack

import torch
from torch import Tensor, nn

from kdcli.api import Batch, ModelShape, Need, StudentOutput, TeacherSignal, TokenSettings
from kdcli.errors import ConfigError
from kdcli.objective._layers import Layered, Layers, rms, spread, upcast
from kdcli.objective._learned import load_learned
from kdcli.ops.chunked import chunk_size, map_chunks, target_logprobs
from kdcli.ops.head import Head

CHUNK = 1024  # targets whose float32 copies exist at once


class TED(Layered):
    """Two runs. Filters g(h) = W h / rms(h) keep of a state what the task needs; each pair of layers has one for the
    student, W [D_t, D_s], and one for the teacher, W [D_t, D_t].

        stage=filters: -log softmax(head(g_s(h_s)))_y - log softmax(head(g_t(h_t)))_y   with both models held fixed
        stage=distill: 1/D_t sum_d (g_s(h_s) - g_t(h_t))_d^2                             with g_t held fixed

    per target, mean over pairs of layers. `filters` is the run that learned them, or its objectives/TERM.safetensors;
    stage=distill needs it, and goes on learning g_s with the student. The paper adds cross-entropy and, per task, a
    Kullback-Leibler term: objectives beside this one. In the first stage the student gets no gradient, so set
    optimizer.weight_decay=0, else that alone changes it; and of the teacher needs its head (teacher=hf).

    Departs from the paper: both filters are read by the teacher's frozen head, where the paper learns a head for each,
    which for a language model is a vocabulary of weights per layer; so the student's filter ends in the teacher's
    width. States are divided by their root mean square first, because those of decoders grow with depth, where BERT
    normalizes each layer's output. Only supervised targets count (the official code's squares have padding too).
    """

    needs = Need.HIDDEN | Need.LOGITS  # as composed without settings; an instance's follow `stage`

    def __init__(
        self,
        *,
        stage: Literal["filters", "distill"] = "filters",
        filters: str | None = None,
        layers: Layers = "uniform",
        **settings: Unpack[TokenSettings],
    ) -> None:
        super().__init__(layers=layers, **settings)
        if stage == "distill" and filters is None:
            raise ConfigError(
                "TED: stage=distill compares what filters keep, and filters is null; train stage=filters first, then "
                "set filters to that run's folder"
            )
        self.stage = stage
        self.filters = filters
        self.needs = Need.HIDDEN | Need.LOGITS if stage == "filters" else Need.HIDDEN
        self.zero_at_teacher = False  # the student's filter need not be the teacher's
        self.stops_gradient = stage == "filters"
        self.student = nn.ParameterDict()  # "3_6": of student layer 3 and teacher layer 6
        self.teacher = nn.ParameterDict()
        self._ids: int | None = None  # that the teacher's head knows

    def fit(self, student: ModelShape, teacher: ModelShape | None) -> None:
        super().fit(student, teacher)
        assert teacher is not None, "Layered.fit refuses it"
        self._ids = teacher.vocab_size
        for s, t in self.pairs(student.layers, teacher.layers):
            # The loss of the first stage is convex in a filter: where it begins does not decide where it ends.
            self.student[f"{s}_{t}"] = nn.Parameter(torch.eye(teacher.width, student.width))
            self.teacher[f"{s}_{t}"] = nn.Parameter(torch.eye(teacher.width), requires_grad=self.stage == "filters")
        if self.filters is not None:
            load_learned(dict(self.named_parameters()), self.filters, "TED: filters")

    def units(self, batch: Batch) -> Tensor:
        units = super().units(batch)
        return units if self._ids is None or self.stage == "distill" else units & (batch.targets < self._ids)

    def forward(self, batch: Batch, student: StudentOutput, teacher: TeacherSignal) -> Tensor:
        ours, theirs = student.hidden_states, teacher.hidden_states
        assert ours is not None and theirs is not None, "it needs HIDDEN"
        pairs = self.pairs(len(ours) - 1, len(theirs) - 1)
        values = [self._pair(batch, f"{s}_{t}", ours[s], theirs[t], teacher.head) for s, t in pairs]
        return spread(torch.stack(values).mean(0), batch.mask)

    def _pair(self, batch: Batch, name: str, student: Tensor, teacher: Tensor, head: Head | None) -> Tensor:
        student, teacher = student[batch.mask], teacher[batch.mask]
        ours, theirs = self.student[name], self.teacher[name]
        if self.stage == "distill":

            def values(student: Tensor, teacher: Tensor) -> Tensor:
                return (_filtered(student, ours) - _filtered(teacher, theirs)).square().mean(-1)

            return map_chunks(values, CHUNK, student, teacher)
        assert head is not None, "stage=filters needs the teacher's head"
        size = chunk_size(head.vocab_size, student.device)
        targets = batch.targets[batch.mask].clamp(max=head.vocab_size - 1)
        filtered = _filtered(student.detach(), ours), _filtered(teacher.detach(), theirs)
        return -sum(target_logprobs(states, head, targets, size) for states in filtered)  # pyright: ignore


def _filtered(states: Tensor, weight: Tensor) -> Tensor:
    """[C, D] -> [C, D_t]."""
    states = upcast(states)
    return nn.functional.linear(states / rms(states), weight.to(states.dtype))
