"""The Distiller under every ZeRO stage, on ranks whose micro-batches differ in their number of targets."""

from __future__ import annotations

from typing import Any

import pytest

from kdcli.engine.zero import Zero
from kdcli.objective.cross_entropy import CrossEntropy
from kdcli.objective.forward_kl import ForwardKL
from kdcli.train.distiller import Distiller
from tests import toys
from tests.distributed import run_ranks

STEPS = 5  # ZeRO-3 fetches ahead, by the order it has seen, from the third step on


def train(stage: int) -> list[float]:
    """The losses of STEPS steps: 2 rows in all, the second with a fifth of the first's targets."""
    import torch

    from tests.train.test_distiller import Learned

    # By default ZeRO-3 shards nothing as small as this model.
    shard_all: dict[str, Any] = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    engine = Zero(stage=stage, precision="fp32", deepspeed=shard_all if stage == 3 else None)  # type: ignore[arg-type]
    engine.start()
    objectives = {"kd": ForwardKL(temperature=2.0), "ce": CrossEntropy(label_smoothing=0.1), "mine": Learned()}
    teacher = toys.ToyTeacher(toys.llama(2, layers=3, width=24))
    distiller = Distiller(toys.ToyStudent(toys.llama(1)), teacher, objectives, chunk=2)
    engine.prepare(
        distiller,
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-2),
        lr_schedule=lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0),
        micro_size=1,
    )
    losses = []
    for step in range(STEPS):
        whole = toys.batch(step, rows=2, length=20)
        whole.mask[1, 5:] = False
        mine = [toys.rows_of(whole, row, row + 1) for row in range(engine.rank, 2, engine.world_size)]
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


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_with_unequal_targets_train_as_one_process(stage: int) -> None:
    """A rank with more targets runs its objectives more often, and must not wait for the others to do the same."""
    (alone,) = run_ranks(1, train, 0)
    for losses in run_ranks(2, train, stage, timeout=60):
        assert losses == pytest.approx(alone, rel=1e-5)
    assert alone[-1] < alone[0]
