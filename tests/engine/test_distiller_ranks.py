"""The Distiller under every ZeRO stage, on ranks whose micro-batches differ in their number of targets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kdcli.api import Batch, Need, Objective, Scope, StudentOutput, TeacherSignal
from kdcli.engine.zero import Zero
from kdcli.objective.cross_entropy import CrossEntropy
from kdcli.objective.forward_kl import ForwardKL
from kdcli.ops.chunked import map_chunks
from kdcli.train.distiller import Distiller
from tests import toys
from tests.distributed import run_ranks

STEPS = 5  # ZeRO-3 fetches ahead, by the order it has seen, from the third step on


class Translated(Objective):
    """Cross-entropy through the student's head of a layer's states and the target's embedding, translated by a learned
    matrix: what ZeRO-3 shards is read in the forward, and again where the backward computes chunks anew."""

    needs = Need.HIDDEN
    scope = Scope.STATES

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.eye(16))

    def forward(self, batch: Batch, student: StudentOutput, teacher: TeacherSignal) -> Tensor:
        head, layers, embedding = student.head, student.hidden_states, student.embedding
        assert head is not None and layers is not None and embedding is not None
        states = layers[1] + nn.functional.embedding(batch.targets, embedding).detach()

        def values(hidden: Tensor, targets: Tensor) -> Tensor:
            log_q = torch.log_softmax(head(hidden @ self.matrix), -1)
            return -log_q.gather(-1, targets.unsqueeze(-1)).squeeze(-1)

        kept = map_chunks(values, 3, states[batch.mask], batch.targets[batch.mask])
        return torch.zeros(batch.mask.shape).masked_scatter(batch.mask, kept)


def terms(kind: str) -> dict[str, Objective]:
    from tests.train.test_distiller import HeadNorm, Learned, Margin, SequenceNLL

    if kind == "chunks":
        return {"kd": ForwardKL(temperature=2.0), "ce": CrossEntropy(label_smoothing=0.1), "mine": Learned()}
    whole = {"sequence": SequenceNLL(weight=0.1), "norm": HeadNorm(weight=0.1), "translated": Translated()}
    return {**whole, "margin": Margin()} if kind == "pairs" else whole


def train(stage: int, kind: str) -> list[float]:
    """The losses of STEPS steps: 2 rows in all, the second with a fifth of the first's targets, or none at all."""
    # By default ZeRO-3 shards nothing as small as this model.
    shard_all: dict[str, Any] = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    engine = Zero(stage=stage, precision="fp32", deepspeed=shard_all if stage == 3 else None)  # type: ignore[arg-type]
    engine.start()
    teacher = toys.ToyTeacher(toys.llama(2, layers=3, width=24))
    distiller = Distiller(toys.ToyStudent(toys.llama(1, tied=kind != "states")), teacher, terms(kind), chunk=2)
    engine.prepare(
        distiller,
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-2),
        lr_schedule=lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0),
        micro_size=1,
    )
    losses = []
    for step in range(STEPS):
        whole = [toys.batch(step + 10 * rank, rows=2, length=20) for rank in range(2)]
        whole[1].mask[:, 5 if step % 2 else 0 :] = False
        for batch in whole:
            batch.group_index, batch.rejected = torch.tensor([0, 0]), torch.tensor([False, True])
        mine = whole[engine.rank :: engine.world_size]
        counts: dict[str, float] = {}
        for batch in mine:
            counts = {name: counts.get(name, 0.0) + value for name, value in distiller.count(batch).items()}
        counts = engine.sum(counts)
        total = 0.0
        for batch in mine:
            loss, _ = engine(batch, counts=counts)
            engine.backward(loss, last=batch is mine[-1])
            total += float(loss.detach())
        engine.step()
        losses.append(engine.sum({"loss": total})["loss"])
    engine.close()
    return losses


@pytest.mark.parametrize("kind", ["chunks", "states", "pairs"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_with_unequal_targets_train_as_one_process(stage: int, kind: str) -> None:
    """A rank with more targets runs its objectives more often, and must not wait for the others to do the same."""
    (alone,) = run_ranks(1, train, 0, kind)
    for losses in run_ranks(2, train, stage, kind, timeout=240):
        assert losses == pytest.approx(alone, rel=1e-5)
    assert alone[-1] < alone[0]
