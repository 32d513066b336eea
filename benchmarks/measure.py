"""A workload measured: first whether each contender is right, then what it costs, then, in turns, how long it takes."""

from __future__ import annotations

import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.contenders import OBJECTIVES, PLAIN, TOP, Contender, Step, reference
from benchmarks.models import Pair
from benchmarks.probes import exact, seconds
from kdcli.api import Batch

# Relative, of the gradient in the Euclidean norm. Total variation's jumps where rounding swaps p and q (float32: 1e-3);
# in bfloat16 it jumps often, so that twice plain torch's own error is allowed too.
TOLERANCE = {torch.float32: 3e-3, torch.bfloat16: 5e-2}
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Job:
    contender: Contender
    batch: Batch


def measure(pair: Pair, jobs: Sequence[Job], rounds: int, device: torch.device, gate: bool = True) -> dict[str, Row]:
    """Name -> what was measured. A row with `void` is wrong, and its numbers mean nothing."""
    rows: dict[str, Row] = {}
    steps: dict[str, partial[None]] = {}
    for objective in dict.fromkeys(job.contender.objective for job in jobs):
        mine = [job for job in jobs if job.contender.objective == objective]
        expected = _expected(pair, mine[0].batch, objective) if objective and gate else None
        allowed = TOLERANCE[pair.student.head.weight.dtype]
        for job in mine:
            contender = job.contender
            row: Row = {"tool": contender.tool, "objective": objective} | _size(pair, job.batch, objective)
            if contender.step is None:
                rows[contender.name] = row | {"absent": "not installed"}
                continue
            loss: list[float] = []
            steps[contender.name] = partial(_once, pair, contender.step, job.batch, loss)
            row |= vars(exact(steps[contender.name], device))
            row["loss"] = loss[0]
            if expected is not None:
                row |= _errors(loss[0], _gradient(pair), *expected)
                if contender.tool == PLAIN and pair.student.head.weight.dtype is not torch.float32:
                    allowed = max(allowed, 2 * row["gradient_error"])
                row["allowed"] = allowed
                if max(row["loss_error"], row["gradient_error"]) > allowed:
                    row["void"] = "differs from the float64 reference"
            rows[contender.name] = row
    for name, taken in _in_turns(steps, rounds, device).items():
        middle = statistics.median(taken)
        rows[name] |= {"seconds": middle, "spread": (max(taken) - min(taken)) / middle}
    return rows


def _size(pair: Pair, batch: Batch, objective: str) -> Row:
    """What the head's cost follows from; `head_flops`: three matmuls of the student and one of the teacher."""
    targets, vocab = int(batch.mask.sum()), pair.student.head.vocab_size
    own, theirs = pair.student.head.weight.shape[1], pair.teacher_head.weight.shape[1]
    width = 6 * own + (0 if objective in ("", TOP) else 2 * theirs)
    return {"targets": targets, "vocabulary": vocab, "head_flops": targets * vocab * width}


def _expected(pair: Pair, batch: Batch, objective: str) -> tuple[float, Tensor]:
    pair.student.zero_grad(set_to_none=True)
    loss = reference(pair, batch, OBJECTIVES[objective][1])
    return loss, _gradient(pair)


def _errors(loss: float, gradient: Tensor, true_loss: float, true_gradient: Tensor) -> Row:
    """Relative, next to float64."""
    return {
        "loss_error": abs(loss - true_loss) / abs(true_loss),
        "gradient_error": float((gradient - true_gradient).norm() / true_gradient.norm()),
    }


def _in_turns(steps: Mapping[str, Any], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each step, every round in another order; a GPU warms up first."""
    order = list(steps)
    for name in order * 3 if rounds and device.type == "cuda" else []:
        steps[name]()
    taken: dict[str, list[float]] = {name: [] for name in order} if rounds else {}
    for _ in range(rounds):
        random.shuffle(order)
        for name in order:
            taken[name].append(seconds(steps[name], device))
    return taken


def _once(pair: Pair, step: Step, batch: Batch, loss: list[float]) -> None:
    pair.student.zero_grad(set_to_none=True)
    value = step(batch)
    if not loss:
        loss.append(float(value.detach()))


def _gradient(pair: Pair) -> Tensor:
    return torch.cat([p.grad.flatten() for p in pair.student.parameters() if p.grad is not None])
