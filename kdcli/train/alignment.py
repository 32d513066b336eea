"""Whether what is learned from one domain helps the others: DoGE, Fan et al. 2023, arXiv:2310.15393."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kdcli.api import Engine
from kdcli.train.distiller import Distiller
from kdcli.train.heldout import HeldOut


def alignments(
    distiller: Distiller, engine: Engine, held_out: HeldOut, before_each: Callable[[], None]
) -> dict[str, float]:
    """<g_i, sum_{j != i} g_j> / mean_j |g_j|, g_i the gradient of the training loss on the held-out rows of domain i.

    Takes the gradient of each domain twice, so that memory (two vectors of the student's size) does not grow with the
    number of domains. Gradients are of whole parameters, so ZeRO stage 3 has none; nothing of the engine's is touched.
    A collective; `before_each` micro-batch may raise. 0 for a domain that is alone.
    """
    parameters = [p for p in distiller.student.parameters() if p.requires_grad]
    total, norms = torch.zeros(sum(p.numel() for p in parameters), device=engine.device), {}
    for name in held_out.rows:
        gradient = _gradient(name, parameters, distiller, engine, held_out, before_each)
        norms[name] = float(gradient.norm())
        total += gradient
    scale = math.fsum(norms.values()) / len(norms) or 1.0
    found = {}
    for name, norm in norms.items() if len(norms) > 1 else ():
        gradient = _gradient(name, parameters, distiller, engine, held_out, before_each)
        found[name] = (float(gradient @ total) - norm**2) / scale
    return found or dict.fromkeys(norms, 0.0)


def _gradient(
    name: str,
    parameters: Sequence[Tensor],
    distiller: Distiller,
    engine: Engine,
    held_out: HeldOut,
    before_each: Callable[[], None],
) -> Tensor:
    """Of one domain, all parameters in one float32 vector, the same on every rank."""
    counts: Counter[str] = Counter()
    for batch in held_out.batches(name):
        counts.update(distiller.count(batch))
    counts_of_all = engine.sum(counts)
    gradient = torch.zeros(sum(p.numel() for p in parameters), device=engine.device)
    for batch in held_out.batches(name):
        before_each()
        loss, _ = distiller(batch.to(engine.device), counts=counts_of_all)
        # Not `backward`: the engine's hooks, which reduce and keep gradients, see nothing of this.
        parts = torch.autograd.grad(loss, parameters, allow_unused=True)
        gradient += torch.cat(
            [
                torch.zeros_like(p).flatten().float() if part is None else part.flatten().float()
                for p, part in zip(parameters, parts, strict=True)
            ]
        )
    if engine.world_size > 1:
        torch.distributed.all_reduce(gradient)
    return gradient
