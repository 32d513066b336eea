"""A teacher and a student small enough to train in a millisecond, and their batches.

A position sees its own token only, so that packing and padding can change nothing but what the loss does with them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from kdcli.api import Batch, Need, Objective, Student, Teacher, TeacherSignal
from kdcli.ops.head import Head
from kdcli.train.conformance.candidate import distance
from kdcli.train.distiller import Distiller

VOCAB, PADDED = 17, 20  # real ids, and rows of the embeddings


class TinyStudent(Student):
    """tanh of an embedding, and a head: tied or not, with a bias, a scale and a soft-cap."""

    def __init__(
        self,
        *,
        seed: int = 1,
        width: int = 8,
        tied: bool = True,
        bias: bool = False,
        scale: float = 1.0,
        softcap: float | None = None,
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embedding = nn.Parameter(torch.randn(PADDED, width, generator=generator))
        self.output = None if tied else nn.Parameter(torch.randn(PADDED, width, generator=generator))
        offset = nn.Parameter(torch.randn(PADDED, generator=generator)) if bias else None
        weight = self.embedding if self.output is None else self.output
        self.head = Head(weight=weight, vocab_size=VOCAB, bias=offset, scale=scale, softcap=softcap)

    def load(self, device: torch.device) -> None: ...

    def forward(self, batch: Batch) -> Tensor:
        return torch.tanh(nn.functional.embedding(batch.input_ids, self.embedding))

    def cast(self, dtype: torch.dtype) -> TinyStudent:
        """The same numbers in another type. Only before a Distiller takes it."""
        self.to(dtype)
        self.head = replace(self.head, weight=self.embedding if self.output is None else self.output)
        return self


class TinyTeacher(Teacher):
    """A wider one of the same kind, frozen. `padding`: what stands in the rows that are no tokens."""

    provides = Need.DISTRIBUTION | Need.LOGITS | Need.LOGPROBS

    def __init__(self, *, padding: float | None = None) -> None:
        self.model = TinyStudent(seed=2, width=12, tied=False).requires_grad_(False)
        if padding is not None:
            self.model.head.weight[VOCAB:] = padding

    @torch.no_grad()
    def annotate(self, batch: Batch, needs: Need) -> TeacherSignal:
        hidden = self.model(batch)
        logprobs = torch.log_softmax(self.model.head(hidden), -1)
        logprobs = logprobs.gather(-1, batch.targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        return TeacherSignal(hidden=hidden, head=self.model.head, logprobs=logprobs)


Terms = Objective | Mapping[str, Objective]


def distiller(objectives: Terms, *, chunk: int | None = None, **student: Any) -> Distiller:
    """The pair with these terms; `student` are settings of TinyStudent."""
    terms = objectives if isinstance(objectives, Mapping) else {"it": objectives}
    return Distiller(TinyStudent(**student), TinyTeacher(), terms, chunk)


def batch(rows: int = 4, length: int = 10, seed: int = 7) -> Batch:
    """Rows of different lengths with masked prompts, padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB, (rows, length + 1), generator=generator)
    position = torch.arange(length)
    end = torch.tensor([length - i % 3 for i in range(rows)]).unsqueeze(1)
    attention = position < end
    mask = attention & (position >= 2)
    return Batch(
        input_ids=ids[:, :-1],
        targets=ids[:, 1:],
        mask=mask,
        attention_mask=attention,
        segment=torch.arange(rows).unsqueeze(1).expand(rows, length).masked_fill(~attention, -1),
        weight=torch.tensor([1.0, 0.5, 2.0, 1.0] * rows)[:rows],
        row=[str(i) for i in range(rows)],
        domain=["default"] * rows,
        group=[None] * rows,
        score=[None] * rows,
    )


def rows(whole: Batch, start: int, stop: int) -> Batch:
    """Rows start..stop as a batch of their own."""
    window = slice(start, stop)
    names = ("input_ids", "targets", "mask", "attention_mask", "weight", "row", "domain", "group", "score")
    segment = torch.where(whole.segment[window] < 0, -1, whole.segment[window] - start)
    return replace(whole, segment=segment, **{name: getattr(whole, name)[window] for name in names})


def packed(whole: Batch) -> Batch:
    """All rows behind each other in one, without padding."""
    keep = whole.attention_mask
    names = ("input_ids", "targets", "mask", "segment")
    position = torch.arange(keep.shape[1]).expand_as(keep)[keep].unsqueeze(0)
    joined = {name: getattr(whole, name)[keep].unsqueeze(0) for name in names}
    return replace(whole, **joined, attention_mask=torch.ones_like(joined["mask"]), position_ids=position)


def step(model: Distiller, micro_batches: Sequence[Batch]) -> Tensor:
    """Loss and gradients of one optimizer step as one vector: the loss, then every parameter's gradient."""
    model.zero_grad()
    counts: dict[str, float] = {}
    for one in micro_batches:
        for name, number in model.count(one).items():
            counts[name] = counts.get(name, 0.0) + number
    total = 0.0
    for one in micro_batches:
        loss, _ = model(one, counts)
        loss.backward()
        total += float(loss.detach())
    return as_vector(total, [p.grad for p in model.parameters() if p.requires_grad])


def as_vector(loss: float, gradients: Sequence[Tensor | None]) -> Tensor:
    return torch.cat([torch.tensor([loss]), *(g.float().flatten() for g in gradients if g is not None)])


def apart(one: Tensor, other: Tensor) -> float:
    """The larger of two relative errors, each by its own largest number: of the loss, and of the gradients."""
    errors = []
    for part in (slice(0, 1), slice(1, None)):
        size = float(other[part].abs().max().clamp(min=1e-6))
        errors.append(distance(one[part] / size, other[part] / size))
    return max(errors)
