"""The engine against a plain-torch loop: ZeRO 0 to 3, one rank and two."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from torch import nn

from kdcli.engine.zero import Zero
from kdcli.errors import ConfigError, NumericsError
from tests.distributed import run_ranks

VOCABULARY, WIDTH, STEPS, MICRO, SIZE = 53, 16, 4, 2, 4


class HeadLoss(nn.Module):
    """Owns a reference to the head's weight, so that ZeRO-3 gathers it for this module too."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return _CrossEntropy.apply(hidden, self.weight, targets)


class _CrossEntropy(torch.autograd.Function):
    """Forms its gradients in the forward, as the Distiller does."""

    @staticmethod
    def forward(ctx, hidden, weight, targets):
        with torch.enable_grad():
            leaf_hidden, leaf_weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
            logits = nn.functional.linear(leaf_hidden.to(leaf_weight.dtype), leaf_weight).float()
            loss = nn.functional.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="sum")
        ctx.save_for_backward(*torch.autograd.grad(loss, (leaf_hidden, leaf_weight)))
        return loss.detach()

    @staticmethod
    def backward(ctx, grad):
        hidden, weight = ctx.saved_tensors
        return hidden * grad, weight * grad, None


class Toy(nn.Module):
    """Embedding, block, norm, head; `tied` shares the first with the last."""

    def __init__(self, tied: bool = True, frozen: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.block = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.register_buffer("offset", torch.full((WIDTH,), 1.0 + 2**-12))
        with torch.no_grad():
            self.embedding.weight.mul_(0.3)
            self.head.weight.copy_(self.embedding.weight)
        if tied:
            self.head.weight = self.embedding.weight
        if frozen:
            self.block.requires_grad_(False)
        self.head_loss = HeadLoss(self.head.weight)

    def forward(self, ids: torch.Tensor, counts: float) -> tuple[torch.Tensor, dict[str, float]]:
        inner = torch.tanh(self.block(self.embedding(ids[:, :-1])))
        hidden = self.norm((inner * self.offset).to(inner.dtype))
        loss = self.head_loss(hidden, ids[:, 1:]) / counts
        return loss, {"loss/total": loss.item()}


def batch(step: int) -> list[torch.Tensor]:
    """The micro-batches of a step, whoever computes them."""
    generator = torch.Generator().manual_seed(step)
    return list(torch.randint(0, VOCABULARY, (SIZE, 9), generator=generator).split(MICRO))


def adamw(groups):
    return torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95))


def halving(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)


def plain(module: nn.Module, steps: int = STEPS, clip: float | None = 1.0, make=adamw) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step, in 30 lines of nothing but torch."""
    learning = [p for p in module.parameters() if p.requires_grad]
    optimizer = make(
        [
            {"params": [p for p in learning if p.dim() >= 2]},
            {"params": [p for p in learning if p.dim() < 2], "weight_decay": 0.0},
        ]
    )
    schedule, history = halving(optimizer), []
    for step in range(steps):
        losses = [module(ids, SIZE * 8)[0] for ids in batch(step)]
        sum(losses).backward()
        norm = nn.utils.clip_grad_norm_(learning, clip or math.inf)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        history.append((sum(losses).item(), norm.item()))
    return history


def started(settings, module, make=adamw) -> Zero:
    engine = Zero(**{"precision": "fp32", **settings})
    engine.start()
    engine.prepare(module, optimizer=make, lr_schedule=halving, micro_size=MICRO)
    return engine


def advance(engine: Zero, steps: range, clip=None) -> list[tuple[float, float]]:
    """What `plain` does, with the engine."""
    history = []
    for step in steps:
        mine = batch(step)[engine.rank :: engine.world_size]
        total = 0.0
        for index, ids in enumerate(mine):
            loss, stats = engine(ids, SIZE * 8)
            engine.backward(loss, last=index == len(mine) - 1)
            total += stats["loss/total"]
        norm = engine.step()
        history.append((engine.sum({"loss": total})["loss"], norm))
    return history


def trained(settings, tied=True, frozen=False, steps=STEPS, make=adamw):
    engine = started(settings, Toy(tied, frozen), make)
    return advance(engine, range(steps)), engine.full_state_dict()


def same(left, right, tolerance):
    for a, b in zip(left, right, strict=True):
        assert a == pytest.approx(b, rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("tied", [True, False])
def test_equals_a_plain_torch_loop(stage, world_size, tied):
    module = Toy(tied)
    expected = plain(module)
    results = run_ranks(world_size, trained, {"stage": stage}, tied)
    for history, _ in results:
        same(history, expected, 1e-6)
    state = results[0][1]
    assert all(other is None for _, other in results[1:])
    for name, value in module.state_dict().items():
        torch.testing.assert_close(state[name], value, atol=2e-6, rtol=0)
        assert state[name].dtype == torch.float32


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_gradients_are_clipped_only_when_asked(stage):
    [(history, _)] = run_ranks(1, trained, {"stage": stage, "gradient_clipping": None})
    same(history, plain(Toy(), clip=None), 1e-6)
    [(history, _)] = run_ranks(1, trained, {"stage": stage, "gradient_clipping": 0.01})
    same(history, plain(Toy(), clip=0.01), 1e-6)


@pytest.mark.parametrize("settings", [{"stage": s, "offload_optimizer": True} for s in (1, 2, 3)])
def test_offload_changes_no_number(settings):
    if settings["stage"] == 3:
        settings["offload_parameters"] = True
    for history, _ in run_ranks(2, trained, settings):
        same(history, plain(Toy()), 1e-6)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_frozen_parameters_stay_and_sgd_works(stage):
    def sgd(groups):
        return torch.optim.SGD(groups, lr=0.1, momentum=0.9)

    results = run_ranks(2, trained, {"stage": stage}, True, True, STEPS, sgd)
    same(results[0][0], plain(Toy(frozen=True), make=sgd), 1e-6)
    torch.testing.assert_close(results[0][1]["block.weight"], Toy().block.weight.detach(), rtol=0, atol=0)


@pytest.mark.parametrize("precision", ["bf16", "bf16_autocast"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_16_bit_follows_the_32_bit_loop(stage, precision):
    results = run_ranks(2, trained, {"stage": stage, "precision": precision})
    same(results[0][0], plain(Toy()), 2e-2)
    state = results[0][1]
    expected = torch.float32 if precision == "bf16_autocast" else torch.bfloat16
    assert state["block.weight"].dtype == expected
    assert state["offset"].dtype == torch.float32, "buffers (rotary frequencies) keep 32 bit"


def test_stage_0_in_16_bit_is_promoted_and_said(capfd):
    def promoted():
        logging.basicConfig(level="INFO", force=True)
        engine = Zero(stage=0, precision="bf16")
        engine.start()
        return engine.stage

    assert run_ranks(1, promoted) == [1]
    assert "trains as stage 1" in capfd.readouterr().err


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_no_optimizer_step_is_taken_before_the_first(stage, precision):
    """DeepSpeed takes one in stage 0 with 16 bit: the weights decay and Adam's bias correction is off by a step."""

    def steps_and_change():
        engine = started({"stage": stage, "precision": precision}, Toy())
        states = engine._engine.basic_optimizer.state.values()
        taken = [float(state["step"]) for state in states if "step" in state]
        before = Toy().block.weight.detach().to(torch.float32)
        state = engine.full_state_dict()
        return taken, (state["block.weight"].float() - before).abs().max().item()

    [(taken, change)] = run_ranks(1, steps_and_change)
    assert not any(taken)
    assert change <= (0.002 if precision == "bf16" else 0.0)  # rounding to bf16, and nothing more


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_gradient_that_is_not_finite_changes_nothing(stage):
    def poisoned():
        engine = started({"stage": stage}, Toy())
        loss, _ = engine(batch(0)[0], 1.0)
        engine.backward(loss * math.nan, last=True)
        with pytest.raises(NumericsError, match="not finite"):
            engine.step()
        return engine.full_state_dict()

    [state] = run_ranks(1, poisoned)
    for name, value in Toy().state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=0, atol=0)


def test_fp16_works_or_is_refused_by_name():
    def outcome():
        try:
            return trained({"stage": 2, "precision": "fp16"})[0][-1][0]
        except ConfigError as error:
            return str(error)

    [result] = run_ranks(1, outcome)
    if isinstance(result, str):
        assert "engine.precision" in result
    else:
        assert math.isfinite(result)


def test_bad_settings_are_refused():
    for settings, word in [
        ({"stage": 2, "offload_parameters": True}, "offload_parameters"),
        ({"stage": 0, "offload_optimizer": True}, "offload_optimizer"),
        ({"gradient_clipping": 0.0}, "gradient_clipping"),
    ]:
        with pytest.raises(ConfigError, match=word):
            Zero(**settings)


def test_ranks_are_added_up_key_by_key():
    def summed():
        engine = Zero()
        engine.start()
        return engine.sum({"a": 0.1, f"only{engine.rank}": 1.0}), engine.gather(engine.rank)

    for totals, gathered in run_ranks(2, summed):
        assert totals == {"a": 0.2, "only0": 1.0, "only1": 1.0}
        assert gathered == [0, 1]


@pytest.mark.parametrize("stage", [1, 3])
def test_activation_checkpointing_changes_no_number(stage):
    """With a transformers model; the recomputation is seen by counting how often the first layer begins."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def losses(recompute):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=53, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
        )
        model = LlamaForCausalLM(config)
        calls = []
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
        engine = started({"stage": stage, "activation_checkpointing": recompute}, model)
        history = []
        for step in range(2):
            ids = batch(step)[0]
            loss = engine(input_ids=ids, labels=ids, use_cache=False).loss
            engine.backward(loss, last=True)
            history.append((loss.item(), engine.step()))
        return history, len(calls)

    (plainly, once), (recomputed, twice) = (run_ranks(1, losses, flag)[0] for flag in (False, True))
    same(recomputed, plainly, 1e-6)
    assert twice == 2 * once


def test_a_model_that_cannot_recompute_is_refused():
    def refused():
        with pytest.raises(ConfigError, match="activation_checkpointing"):
            started({"activation_checkpointing": True}, Toy())

    run_ranks(1, refused)


def test_runs_may_follow_each_other_in_one_process():
    """And leave nothing behind that a fork would inherit."""

    def twice():
        import os

        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            os.environ.pop(name, None)
        histories = []
        for stage, precision in ((2, "bf16_autocast"), (0, "fp32"), (3, "fp32")):
            engine = started({"stage": stage, "precision": precision}, Toy())
            histories.append(advance(engine, range(STEPS)))
            engine.close()
            assert not torch.distributed.is_initialized()
        return histories

    [(_, zero, three)] = run_ranks(1, twice, join=False)
    same(zero, plain(Toy()), 1e-6)
    same(three, plain(Toy()), 1e-6)
