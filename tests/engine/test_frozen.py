"""A frozen model split over ranks beside the engine's own, and parameters gathered for reading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kdcli.engine.zero import Zero
from kdcli.store.models import load_model
from tests import families
from tests.distributed import run_ranks
from tests.engine.test_zero import Toy, advance, started


def read(stage: int) -> tuple[list[Any], int]:
    """The student's parameters before and after a step, and how many numbers this rank has of them in between."""
    shard_all = {"zero_optimization": {"stage3_param_persistence_threshold": 0}} if stage == 3 else None
    engine = started({"stage": stage, "deepspeed": shard_all}, module := Toy())
    seen = []
    for step in range(2):
        parameters = list(module.parameters())
        with engine.whole([*parameters, *parameters[:1]]), engine.whole(parameters[:1]):  # again, and inside
            seen.append([p.detach().clone() for p in parameters])
        held = sum(p.numel() for p in parameters)
        advance(engine, range(step, step + 1))
    engine.close()
    return seen, held


def test_parameters_are_whole_inside_and_training_goes_on() -> None:
    whole = {stage: run_ranks(2, read, stage) for stage in (0, 3)}
    for stage, told in whole.items():
        for (before, after), held in told:
            assert not torch.equal(before[0], after[0]), "the second reading sees the step"
            assert (held == 0) == (stage == 3)
            for one, other in zip([*before, *after], [*whole[0][0][0][0], *whole[0][0][0][1]], strict=True):
                torch.testing.assert_close(one, other, atol=2e-6, rtol=0)


def passes(path: str) -> list[bool]:
    """Whether each pass with the head, and without, gives what the whole model gives; then what a close leaves."""
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
    from transformers.integrations import is_deepspeed_zero3_enabled

    running = len(FWD_MODULE_STACK)
    engine = Zero(precision="fp32")
    engine.start()
    model, whole = engine.sharded(lambda: load_model(path), torch.float32), load_model(path)
    ids, equal = families.ids(seed=engine.rank, rows=2, length=6 + engine.rank), []
    with torch.no_grad():
        for turn in range(6):
            if turn % 3 == 2:
                equal.append(torch.equal(model(ids).logits, whole(ids).logits))
            else:
                pair = [one.base_model(ids).last_hidden_state for one in (model, whole)]
                equal.append(torch.equal(*pair))
    with engine.whole(model.parameters()):
        equal += [torch.equal(one, other) for one, other in zip(model.parameters(), whole.parameters(), strict=True)]
    engine.close()
    return [*equal, len(FWD_MODULE_STACK) == running, not is_deepspeed_zero3_enabled()]


@pytest.mark.parametrize("family", ["llama", "llama_tied"])
def test_a_split_model_computes_what_it_computes_whole(family: str, tmp_path: Path) -> None:
    for told in run_ranks(2, passes, families.folder(tmp_path, family)):
        assert all(told), told
