"""One gathered chunk of targets with random float64 logits, as a token objective sees it."""

from __future__ import annotations

import torch
from torch import Tensor

from kdcli.api import Batch, TeacherSignal, TopK
from tests.toys import batch as toy_batch

V = 19


def chunk(targets: int = 9, spread: float = 2.0) -> tuple[Batch, Tensor, Tensor]:
    """A batch of B = 1, all of it supervised, and logits [1, C, V] of teacher and student."""
    generator = torch.Generator().manual_seed(5)
    whole = toy_batch(vocab=V, rows=1, length=targets)
    whole.mask.fill_(True)
    y, z = (spread * torch.randn(1, targets, V, generator=generator, dtype=torch.float64) for _ in range(2))
    return whole, y, z


def stored(y: Tensor, k: int, temperature: float = 1.0) -> TeacherSignal:
    """The K likeliest ids of a teacher, in an order of their own."""
    logprobs, ids = torch.log_softmax(y / temperature, -1).topk(k)
    order = torch.randperm(k, generator=torch.Generator().manual_seed(k))
    return TeacherSignal(topk=TopK(ids=ids[..., order], logprobs=logprobs[..., order], temperature=temperature))
