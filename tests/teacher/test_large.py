"""Teachers whose parameters live elsewhere say what the local one says: split over ranks, on disk, in few bits."""

from __future__ import annotations

import gc
import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kdcli.api import Batch, Need, Teacher
from kdcli.engine.zero import Zero
from kdcli.errors import ConfigError
from kdcli.objective.forward_kl import ForwardKL
from kdcli.objective.hidden_mse import HiddenMSE
from kdcli.store.layers import shape_of
from kdcli.student.hf import HFStudent
from kdcli.student_init.keep_layers import KeepLayers
from kdcli.teacher.hf import HFTeacher
from kdcli.teacher.hf_offloaded import HFOffloadedTeacher
from kdcli.teacher.hf_sharded import HFShardedTeacher
from kdcli.teacher.hf_tensor_parallel import HFTensorParallelTeacher
from kdcli.train.distiller import Distiller
from tests import families, runs, toys
from tests.distributed import run_ranks

CPU = torch.device("cpu")
KINDS: dict[str, Any] = {
    "local": HFTeacher,
    "sharded": HFShardedTeacher,
    "disk": lambda **settings: HFOffloadedTeacher(offload="disk", **settings),
    "parallel": HFTensorParallelTeacher,
}
ALL = Need.DISTRIBUTION | Need.LOGPROBS | Need.HIDDEN
STEPS = 4  # ZeRO-3 fetches ahead from the third pass on


def started(stage: int = 0) -> Zero:
    shard_all: dict[str, Any] = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    settings: dict[str, Any] = {"stage": stage, "deepspeed": shard_all if stage == 3 else None}
    engine = Zero(precision="fp32", gradient_clipping=None, **settings)
    engine.start()
    return engine


def loaded(engine: Zero, kind: str, **settings: Any) -> Teacher:
    teacher = KINDS[kind](**({"dtype": "float32"} | settings))
    teacher.place(engine)
    teacher.load(engine.device)
    return teacher


def batch_of(rank: int, step: int) -> Batch:
    """Micro-batches of ranks have different widths."""
    return toys.batch(step + 10 * rank, rows=2 + rank, length=9 + 4 * rank, vocab=len(families.WORDS))


# --------------------------------------------------------------------------------------------------------- agreement


def trained(path: str, stage: int) -> dict[str, tuple[list[float], dict[str, torch.Tensor]]]:
    """By kind: the losses of STEPS steps of plain gradient descent, and the student after them."""
    found = {}
    for kind in KINDS:
        engine = started(stage)
        teacher = loaded(engine, kind, path=path)
        terms = {"kd": ForwardKL(), "hidden": HiddenMSE(weight=0.1)}
        student = toys.ToyStudent(toys.llama(1, layers=2, width=16, vocab=families.ROWS), len(families.WORDS))
        student.shape = lambda model=student.model: shape_of(model.config, len(families.WORDS))  # type: ignore[method-assign]
        distiller = Distiller(student, teacher, terms, chunk=8)
        engine.prepare(
            distiller,
            optimizer=lambda groups: torch.optim.SGD(groups, lr=0.5),
            lr_schedule=lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0),
            micro_size=2,
        )
        losses = []
        for step in range(STEPS):
            batch = batch_of(engine.rank, step)
            counts = engine.sum(distiller.count(batch))
            loss, _ = engine(batch, counts=counts)
            engine.backward(loss, last=True)
            engine.step()
            losses.append(engine.sum({"loss": float(loss.detach())})["loss"])
        found[kind] = losses, engine.full_state_dict() or {}
        engine.close()
    return found


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_on_two_ranks_the_student_learns_the_same_wherever_the_teacher_lives(stage: int, tmp_path: Path) -> None:
    """The steps' losses and the sum of the gradients, which is what plain descent adds up. Split and offloaded, the
    teacher computes the very same numbers; cut for tensor parallelism it adds products up in another order."""
    path = families.folder(tmp_path)
    first, second = run_ranks(2, trained, path, stage)
    losses, expected = first["local"]
    begun = toys.llama(1, layers=2, width=16, vocab=families.ROWS).state_dict()
    names = {f"student.model.{name}": value for name, value in begun.items()}
    for kind, (own, state) in first.items():
        assert own == second[kind][0]
        assert own == pytest.approx(losses, rel=1e-6)
        exact = kind in ("sharded", "disk")
        assert not exact or own == losses
        for name, value in names.items():
            moved = (expected[name] - value).norm()
            assert moved > 0
            assert (state[name] - expected[name]).norm() <= (0.0 if exact else 1e-5) * moved, (kind, name)


def signals(path: str, dtype: str) -> dict[str, Any]:
    """By kind what the teacher says of STEPS batches of this rank, and the bytes that it holds afterwards."""
    engine, found, held = started(), {}, {}
    gc.freeze()  # what is there already: `live` need not look at it
    batches, teachers = [batch_of(engine.rank, step) for step in range(STEPS)], []

    def said(teacher: Teacher) -> list[torch.Tensor]:
        return [one.float() for batch in batches for one in flat(teacher.annotate(batch, ALL))]

    for kind in KINDS:
        teacher = loaded(engine, kind, path=path, dtype=dtype)
        if engine.rank == 0:  # one that partitioned what others load would wait here for the other rank
            HFTeacher(path=path).load(CPU)
        said(teacher)
        held[kind] = live() - sum(held.values())  # of those before too: the engine closes split ones at its end
        teachers.append(teacher)
    for kind, teacher in zip(KINDS, teachers, strict=True):
        found[kind] = said(teacher)
    found["exact"] = said(loaded(engine, "local", path=path))
    engine.close()
    return found | {"held": held}


def flat(signal: Any) -> list[torch.Tensor]:
    return [signal.hidden, signal.logprobs, *signal.hidden_states, signal.head(signal.hidden)]


def live() -> int:
    """Bytes of all tensors made since `gc.freeze`, each storage once; of a distributed one the part that lies here."""
    gc.collect()
    tensors = [one for one in gc.get_objects() if type(one) in (torch.Tensor, torch.nn.Parameter)]
    storages = [one.untyped_storage() for one in tensors if one.device.type == "cpu"]
    return sum({one.data_ptr(): one.nbytes() for one in storages}.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_teacher_in_parts_says_the_same_from_half_of_the_memory(dtype: str, tmp_path: Path) -> None:
    """Bit for bit, but for tensor parallelism: its distance to the local one in float32 is at most twice the local
    one's own in bfloat16, and 1e-5 of the norm in float32."""
    path = families.folder(tmp_path, "qwen3", num_hidden_layers=8, hidden_size=48, tie_word_embeddings=True)
    for told in run_ranks(2, signals, path, dtype):
        held, exact, local = told.pop("held"), told.pop("exact"), told["local"]
        for kind, saying in told.items():
            if kind != "parallel":
                assert all(torch.equal(one, other) for one, other in zip(saying, local, strict=True))
                continue
            one, other, true = (torch.cat([part.flatten() for part in said]) for said in (saying, local, exact))
            allowed = 1e-5 * true.norm() if dtype == "float32" else 2 * (other - true).norm()
            assert (one - true).norm() <= allowed
        assert held["sharded"] < 0.55 * held["local"], held
        assert held["parallel"] < 0.55 * held["local"], held
        assert held["disk"] < 0.15 * held["local"], held


# ------------------------------------------------------------------------------------------------ one rank, and runs


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["gpt2", "gemma3_text"])
def test_one_process_is_enough(kind: str, family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, batch = families.folder(tmp_path, family), batch_of(0, 0)
    engine = started()
    expected = flat(loaded(engine, "local", path=path).annotate(batch, ALL))
    with caplog.at_level(logging.INFO):
        found = flat(loaded(engine, kind, path=path).annotate(batch, ALL))
    engine.close()
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert ("one process" in caplog.text) == (kind in ("sharded", "parallel"))


def test_a_run_with_a_split_teacher_resumes_exactly(tmp_path: Path) -> None:
    changes = {
        "teacher___target_": "kdcli.teacher.hf_sharded.HFShardedTeacher",
        "engine__stage": 3,
        "evaluation": runs.heldout(tmp_path / "whole"),
    }
    whole = runs.write_run(tmp_path / "whole", **changes)
    assert runs.work(whole, ranks=2) == [0, 0]
    stopped = runs.write_run(tmp_path / "stopped", **changes)
    assert runs.work(stopped, ranks=2, fault="step.optim:step=4:kill") != [0, 0]
    assert runs.checkpoints(stopped) == ["step-000002"]
    assert runs.work(stopped, ranks=2) == [0, 0]
    assert runs.lines(stopped) == runs.lines(whole)


# ------------------------------------------------------------------------------------------------------------ refusals


def test_wrong_weights_are_refused_by_every_rank(tmp_path: Path) -> None:
    """Rank 0 alone reads them: if it alone found out, the other would wait for it."""
    path = families.folder(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("model.layers.3.mlp.up_proj.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})

    def refused() -> str:
        with pytest.raises(ConfigError) as caught:
            loaded(started(), "sharded", path=path)
        return str(caught.value)

    assert all("missing weights: model.layers.3.mlp.up_proj.weight" in told for told in run_ranks(2, refused))


def test_what_is_not_installed_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdcli.store.adapters.find_spec", lambda name: None)
    for make, package, extra in [
        (HFShardedTeacher, "accelerate", "large"),
        (HFOffloadedTeacher, "accelerate", "large"),
        (lambda path: HFTeacher(path=path, quantization="8bit"), "bitsandbytes", "quant"),
    ]:
        with pytest.raises(ConfigError, match=rf'{package}.*pip install "kdcli\[{extra}\]"'):
            make(path="any")


@pytest.mark.parametrize(("family", "ranks", "word"), [("gpt2", 2, "no plan"), ("llama", 4, "2 heads cannot be dealt")])
def test_a_model_that_cannot_be_cut_for_tensor_parallelism_is_refused_before_it_loads(
    family: str, ranks: int, word: str, tmp_path: Path
) -> None:
    teacher = HFTensorParallelTeacher(path=families.folder(tmp_path, family))
    engine: Any = SimpleNamespace(world_size=ranks)
    with pytest.raises(ConfigError, match=rf"{word}.*teacher=hf_sharded"):
        teacher.place(engine)
    assert not teacher.provides & (Need.ATTENTION | Need.RELATIONS)


@pytest.mark.parametrize("kind", ["sharded", "disk", "quantized"])
def test_a_student_is_not_cut_from_a_teacher_in_parts(kind: str, tmp_path: Path) -> None:
    if kind == "quantized":
        pytest.importorskip("bitsandbytes")
    path = families.folder(tmp_path)
    engine = started()
    few = {"quantization": "8bit"} if kind == "quantized" else {}
    teacher = loaded(engine, "local" if few else kind, path=path, **few)
    with pytest.raises(ConfigError, match="teacher=hf"):
        KeepLayers(layers=[0, 1])(HFStudent(), teacher)
    engine.close()


# ------------------------------------------------------------------------------------------------------------ few bits


@pytest.mark.parametrize(("quantization", "divergence"), [("8bit", 2e-4), ("4bit", 5e-3)])
def test_few_bits_say_nearly_the_same(quantization: Any, divergence: float) -> None:
    """KL(float32 || quantized) in nats per target, on kdcli's tiny pretrained model; the head stays as it is."""
    pytest.importorskip("bitsandbytes")
    path = "recipes://data/tiny_teacher"
    exact, few = HFTeacher(path=path, dtype="float32"), HFTeacher(path=path, dtype="float32", quantization=quantization)
    for teacher in (exact, few):
        teacher.load(CPU)
    ids = exact.tokenizer(runs.TEXT * 3, return_tensors="pt").input_ids
    batch = replace(
        toys.batch(rows=1, length=ids.shape[1]),
        input_ids=ids,
        targets=ids,
        mask=torch.ones_like(ids, dtype=torch.bool),
        attention_mask=torch.ones_like(ids, dtype=torch.bool),
    )
    log_p, log_q = (torch.log_softmax(flat(teacher.annotate(batch, ALL))[-1], -1) for teacher in (exact, few))
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    assert 0 < kl < divergence
    assert few.head is not None and exact.head is not None
    assert torch.equal(few.head.weight, exact.head.weight)
    assert exact.fingerprint() != few.fingerprint()
    stored = {p.element_size() * p.numel() for p in few.frozen.model.layers[0].mlp.up_proj.parameters()}
    assert max(stored) <= exact.frozen.model.layers[0].mlp.up_proj.weight.numel() * (
        1 if quantization == "8bit" else 0.5
    )
