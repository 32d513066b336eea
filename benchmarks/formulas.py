"""The objectives in plain torch: on whole logits and through autograd, as one would write them without kdcli.

In float32 they are contenders; in float64 they are the reference that every contender is held to.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import kl_div

TOP_K = 64
BETA, ALPHA = 0.5, 0.1  # the defaults of kdcli's generalized_jsd and skew_kl

Formula = Callable[[Tensor, Tensor], Tensor]  # logits of student and teacher [N, V] -> values [N]


def forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    return _kl(teacher.log_softmax(-1), student.log_softmax(-1))


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    return _kl(student.log_softmax(-1), teacher.log_softmax(-1))


def jsd(student: Tensor, teacher: Tensor) -> Tensor:
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    log_m = torch.logaddexp(log_p + math.log(BETA), log_q + math.log1p(-BETA))
    return BETA * _kl(log_p, log_m) + (1 - BETA) * _kl(log_q, log_m)


def skew_kl(student: Tensor, teacher: Tensor) -> Tensor:
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    return _kl(log_p, torch.logaddexp(log_p + math.log(ALPHA), log_q + math.log1p(-ALPHA)))


def total_variation(student: Tensor, teacher: Tensor) -> Tensor:
    return 0.5 * (teacher.softmax(-1) - student.softmax(-1)).abs().sum(-1)


def top_k_kl(student: Tensor, teacher: Tensor) -> Tensor:
    return sparse_kl(student, *teacher.log_softmax(-1).topk(TOP_K))


def sparse_kl(student: Tensor, logprobs: Tensor, ids: Tensor) -> Tensor:
    """Forward KL over the K ids [N, K] of the teacher and one symbol for the rest."""
    log_q = student.log_softmax(-1).gather(-1, ids)
    rest_p, rest_q = (torch.log(-torch.expm1(x.logsumexp(-1, keepdim=True))) for x in (logprobs, log_q))
    return _kl(torch.cat([logprobs, rest_p], -1), torch.cat([log_q, rest_q], -1))


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
