"""Who is measured: plain torch, TRL, Liger and kdcli, each as a function that runs one step's forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import formulas
from benchmarks.formulas import Formula
from benchmarks.models import Cached, Pair
from kdcli.api import Batch, Objective, Teacher
from kdcli.objective.cross_entropy import CrossEntropy
from kdcli.objective.forward_kl import ForwardKL
from kdcli.objective.generalized_jsd import GeneralizedJSD
from kdcli.objective.reverse_kl import ReverseKL
from kdcli.objective.skew_kl import SkewKL
from kdcli.objective.total_variation import TotalVariation
from kdcli.teacher.none import NoTeacher
from kdcli.train.distiller import Distiller

Step = Callable[[Batch], Tensor]  # leaves gradients in the student's parameters and returns the loss, a mean

SFT, FLOOR, PLAIN = "SFT", "SFT, then the teacher's forward", "plain torch"
TOP = f"cached top-{formulas.TOP_K} forward KL"
OBJECTIVES: dict[str, tuple[type[Objective], Formula]] = {
    "forward KL": (ForwardKL, formulas.forward_kl),
    "reverse KL": (ReverseKL, formulas.reverse_kl),
    "JSD": (GeneralizedJSD, formulas.jsd),
    "skew KL": (SkewKL, formulas.skew_kl),
    "total variation": (TotalVariation, formulas.total_variation),
    TOP: (ForwardKL, formulas.top_k_kl),
}
BETAS = {"forward KL": 0.0, "JSD": 0.5, "reverse KL": 1.0}  # TRL's and Liger's name for the same three


@dataclass(frozen=True, kw_only=True)
class Contender:
    tool: str
    objective: str  # a key of OBJECTIVES, or "" for what no distillation can go below
    step: Step | None  # None: not installed
    dense: bool = False  # makes logits of the whole batch

    @property
    def name(self) -> str:
        return f"{self.tool}, {self.objective}" if self.objective else self.tool


def contenders(pair: Pair, batch: Batch, objectives: Iterable[str] = OBJECTIVES) -> list[Contender]:
    """Of each objective all who have it, kdcli last."""
    cached = Cached(pair, batch)
    found = [*_floor(pair)]
    for name in objectives:
        objective, formula = OBJECTIVES[name]
        sparse = name == TOP
        found.append(
            Contender(
                tool=PLAIN,
                objective=name,
                dense=True,
                step=_plain_sparse(pair, cached) if sparse else _plain(pair, formula),
            )
        )
        if name in BETAS:
            found += _trl(pair, name) + _trl_chunked(pair, name) + _liger(pair, name)
        teacher = cached if sparse else pair.teacher
        found.append(Contender(tool="kdcli", objective=name, step=kdcli(pair, teacher, {"kd": objective()})))
    return found


def kdcli(pair: Pair, teacher: Teacher, objectives: Mapping[str, Objective], chunk: int | None = None) -> Step:
    distiller = Distiller(pair.student, teacher, objectives, chunk=chunk)

    def run(batch: Batch) -> Tensor:
        loss, _ = distiller(batch, distiller.count(batch))
        loss.backward()
        return loss

    return run


def reference(pair: Pair, batch: Batch, formula: Formula, rows: int = 64) -> float:
    """The mean loss in float64 from the heads on, over the whole vocabulary; gradients are left in the parameters."""
    hidden = pair.student(batch)
    at_targets = hidden[batch.mask]
    of_teacher = pair.teacher_hidden(batch)[batch.mask].double()
    leaf = at_targets.detach().double().requires_grad_()
    weight = pair.student.head.weight.detach().double().requires_grad_()
    teacher_weight = pair.teacher_head.weight.double()
    total = 0.0
    for start in range(0, len(leaf), rows):
        window = slice(start, start + rows)
        value = formula(leaf[window] @ weight.T, of_teacher[window] @ teacher_weight.T).sum() / len(leaf)
        value.backward()
        total += float(value.detach())
    assert leaf.grad is not None and weight.grad is not None, "there were targets"
    at_targets.backward(leaf.grad.to(at_targets.dtype))
    own = pair.student.head.weight
    gradient = weight.grad.to(own.dtype)
    own.grad = gradient if own.grad is None else own.grad + gradient  # tied heads have the embedding's already
    return total


def _floor(pair: Pair) -> list[Contender]:
    def sft(batch: Batch) -> Tensor:
        labels = batch.targets.masked_fill(~batch.mask, -100)
        loss = torch.nn.functional.cross_entropy(pair.logits(batch).flatten(0, 1).float(), labels.flatten())
        loss.backward()
        return loss

    def both(batch: Batch) -> Tensor:
        pair.teacher_logits(batch)
        return sft(batch)

    return [
        Contender(tool=SFT, objective="", step=sft, dense=True),
        Contender(tool=FLOOR, objective="", step=both, dense=True),
        Contender(tool="kdcli, SFT", objective="", step=kdcli(pair, NoTeacher(), {"ce": CrossEntropy()})),
    ]


def _plain(pair: Pair, formula: Formula) -> Step:
    def run(batch: Batch) -> Tensor:
        teacher, student = pair.teacher_logits(batch)[batch.mask], pair.logits(batch)[batch.mask]
        loss = formula(student.float(), teacher.float()).mean()
        loss.backward()
        return loss

    return run


def _plain_sparse(pair: Pair, cached: Cached) -> Step:
    def run(batch: Batch) -> Tensor:
        student = pair.logits(batch)[batch.mask].float()
        loss = formulas.sparse_kl(student, cached.topk.logprobs[batch.mask], cached.topk.ids[batch.mask]).mean()
        loss.backward()
        return loss

    return run


def _trl(pair: Pair, name: str) -> list[Contender]:
    """TRL's GKDTrainer loss, called as its compute_loss does."""
    try:
        from trl.experimental.gkd import GKDTrainer  # pyright: ignore[reportMissingImports]
    except ImportError:
        return [Contender(tool="TRL GKDTrainer", objective=name, step=None)]

    def run(batch: Batch) -> Tensor:
        labels = batch.targets.masked_fill(~batch.mask, -100)
        student, teacher = pair.logits(batch), pair.teacher_logits(batch)
        loss = GKDTrainer.generalized_jsd_loss(
            student_logits=student, teacher_logits=teacher, labels=labels, beta=BETAS[name]
        )
        loss.backward()
        return loss

    return [Contender(tool="TRL GKDTrainer", objective=name, step=run, dense=True)]


def _trl_chunked(pair: Pair, name: str) -> list[Contender]:
    """TRL's DistillationTrainer loss: tiles of the vocabulary, recomputed in the backward."""
    try:
        from trl.trainer.distillation_trainer import (  # pyright: ignore[reportMissingImports]
            _chunked_divergence_loss,
        )
    except ImportError:
        return [Contender(tool="TRL DistillationTrainer", objective=name, step=None)]

    def run(batch: Batch) -> Tensor:
        loss, _, _ = _chunked_divergence_loss(
            pair.student(batch),
            pair.teacher_hidden(batch),
            pair.student.head.weight,
            pair.teacher_head.weight,
            batch.mask,
            BETAS[name],
        )
        loss.backward()
        return loss

    return [Contender(tool="TRL DistillationTrainer", objective=name, step=run)]


def _liger(pair: Pair, name: str) -> list[Contender]:
    """Liger's fused linear JSD without its cross-entropy; chunks of 128 targets, compiled where there is a GPU."""
    try:
        from liger_kernel.chunked_loss.jsd_loss import (  # pyright: ignore[reportMissingImports]
            LigerFusedLinearJSDLoss,
        )
    except ImportError:
        return [Contender(tool="Liger", objective=name, step=None)]
    compiled = pair.student.head.weight.is_cuda
    loss_of = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=BETAS[name], compiled=compiled, chunk_size=128
    )

    def run(batch: Batch) -> Tensor:
        labels = batch.targets.masked_fill(~batch.mask, -100)
        loss = loss_of(
            pair.student(batch).flatten(0, 1),
            pair.student.head.weight,
            pair.teacher_hidden(batch).flatten(0, 1),
            pair.teacher_head.weight,
            labels.flatten(),
        )
        loss.backward()
        return loss

    return [Contender(tool="Liger", objective=name, step=run)]
