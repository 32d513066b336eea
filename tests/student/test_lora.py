"""Adapters: what learns, what is exported, and what is refused before weights load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from kdcli.errors import ConfigError
from kdcli.store import blueprint
from kdcli.store.shards import value_of
from kdcli.student.hf import HFStudent
from kdcli.student.lora import LoRA
from kdcli.train.export import StudentFolder, write_weights
from tests import families

CPU = torch.device("cpu")


def trained(path: str, **settings: Any) -> LoRA:
    """A student whose adapter has moved away from where it began."""
    student = LoRA(path=path, **settings)
    student.load(CPU)
    student.settle()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if ".lora_" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return student.eval()


def exported(student: HFStudent, folder: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> Path:
    """`folder/student`, as a run writes it."""
    blueprint.write(folder / "plan", student)
    tensors = dict(student.model.named_parameters(remove_duplicate=False)) | dict(student.model.named_buffers())

    class Reading:
        def __init__(self, names: list[str]) -> None:
            self.values = [value_of(tensors[name]) for name in names]

        def __enter__(self) -> list[torch.Tensor]:
            return self.values

        def __exit__(self, *_: object) -> None: ...

    plan = blueprint.read(folder / "plan")
    writer = StudentFolder(
        folder / "student",
        plan,
        dtype,
        lambda beside: blueprint.furnish(beside, folder / "plan", dtype),
        student.model,
        **settings,
    )
    write_weights(plan, Reading, writer)  # type: ignore[arg-type]
    writer.finish("card")
    if writer.problem is not None:
        raise writer.problem
    return folder / "student"


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama_tied", {"rslora": True}),
        ("qwen2", {"dora": True, "target_modules": ["q_proj", "down_proj"]}),  # biases beside the weights
        ("gpt2", {"dora": True}),  # weights stored transposed
        ("llama", {"init": "pissa", "modules_to_save": ["lm_head"]}),
        ("llama", {"new_tokens": ["<a>"] * 1, "target_modules": r".*\.[qv]_proj"}),
    ],
)
def test_the_exported_model_is_the_trained_one_without_an_adapter(family: str, settings: Any, tmp_path: Path) -> None:
    # weights so small that the layers do not multiply what float32 rounds
    student = trained(families.folder(tmp_path / "model", family, initializer_range=0.1), rank=3, **settings)
    plain = AutoModelForCausalLM.from_pretrained(exported(student, tmp_path)).eval()
    assert not [name for name, _ in plain.named_parameters() if "lora" in name]
    logits = families.logits(student.model, families.ids())
    assert (families.logits(plain, families.ids()) - logits).abs().max() < 1e-5 * logits.abs().max()
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    moved = families.logits(before, families.ids()) - families.logits(plain, families.ids())[..., : families.ROWS]
    assert moved.abs().max() > 0.1


def test_the_adapter_beside_it_is_one_that_peft_loads(tmp_path: Path) -> None:
    folder = families.folder(tmp_path / "model", "llama")
    student = trained(folder, rank=2, dora=True, target_modules=["q_proj"], modules_to_save=["lm_head"])
    with torch.no_grad():
        student.model.lm_head.weight.mul_(1.1)
    adapter = exported(student, tmp_path) / "adapter"
    base = AutoModelForCausalLM.from_pretrained(folder)
    found = PeftModel.from_pretrained(base, adapter).eval()
    torch.testing.assert_close(
        families.logits(found, families.ids()), families.logits(student.model, families.ids()), rtol=1e-5, atol=1e-5
    )
    assert len(load_file(adapter / "adapter_model.safetensors")) == 3 * 4 + 1


def test_only_the_adapter_learns_and_every_rank_begins_alike(tmp_path: Path) -> None:
    folder = families.folder(tmp_path)
    first, other = LoRA(path=folder, rank=2), LoRA(path=folder, rank=2)
    for seed, student in enumerate((first, other)):
        torch.manual_seed(seed)
        student.load(CPU)
        student.settle()
    learning = {name for name, parameter in first.named_parameters() if parameter.requires_grad}
    assert learning
    assert all(".lora_" in name for name in learning)
    for one, two in zip(first.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(families.logits(first.model, families.ids()), families.logits(plain, families.ids()))


def test_more_may_learn_and_less(tmp_path: Path) -> None:
    student = LoRA(
        path=families.folder(tmp_path, "llama_tied"), rank=2, train=["*norm.weight"], freeze=["model.layers.0.*"]
    )
    student.check(student.architecture, lambda: None)
    student.load(CPU)
    student.settle()
    learning = [name for name, parameter in student.model.named_parameters() if parameter.requires_grad]
    assert "model.norm.weight" in learning
    assert not [name for name in learning if ".layers.0." in name]
    assert {".lora_" in name or name.endswith("norm.weight") for name in learning} == {True}


def test_a_tied_head_that_learns_whole_is_the_embedding(tmp_path: Path) -> None:
    student = LoRA(path=families.folder(tmp_path, "llama_tied"), rank=2, modules_to_save=["lm_head"])
    student.load(CPU)
    student.settle()
    assert student.model.get_input_embeddings().weight.requires_grad


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"target_modules": ["q_prj"]},
            r"student\.target_modules: LlamaForCausalLM has no module q_prj; did you mean q_",
        ),
        ({"target_modules": ["lm_head"]}, "lm_head is the head, .* put it into student.modules_to_save"),
        ({"target_modules": ["input_layernorm"]}, "is a LlamaRMSNorm, and LoRA sits on linear layers"),
        ({"modules_to_save": ["lm_hed"]}, "has no module lm_hed; did you mean lm_head"),
        ({"freeze": ["*"]}, "nothing is left that may learn"),
        ({"train": ["*nrm*"]}, r"student\.train: \*nrm\* names no parameter; "),
    ],
)
def test_what_does_not_fit_is_refused_without_weights(settings: Any, message: str, tmp_path: Path) -> None:
    families.config("llama").save_pretrained(tmp_path)  # there are no weights to load
    student = LoRA(path=str(tmp_path), **settings)
    with pytest.raises(ConfigError, match=message):
        student.check(student.architecture, lambda: None)


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"alpha": 0.0}, {"dropout": 1.0}])
def test_impossible_numbers_are_refused(wrong: Any) -> None:
    with pytest.raises(ConfigError, match=f"student: {next(iter(wrong))} is "):
        LoRA(path="x", **wrong)


def test_weights_in_4_bits_are_exported_as_what_they_stand_for_with_the_adapter(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from bitsandbytes.functional import dequantize_4bit

    folder = families.folder(tmp_path / "model", "llama", hidden_size=64)
    student = trained(folder, rank=2, quantization="4bit", target_modules=["q_proj"])
    layer = student.model.model.layers[1].self_attn.q_proj
    held = layer.base_layer.weight
    assert held.dtype == torch.uint8
    plain = AutoModelForCausalLM.from_pretrained(exported(student, tmp_path))
    found = plain.model.layers[1].self_attn.q_proj.weight
    up, down = (part["default"].weight.float() for part in (layer.lora_B, layer.lora_A))
    adapter = layer.scaling["default"] * up @ down
    torch.testing.assert_close(found, dequantize_4bit(held.data, held.quant_state).float() + adapter)
    whole = AutoModelForCausalLM.from_pretrained(folder).model.layers[1].self_attn.q_proj.weight
    assert 0 < (found - adapter - whole).abs().max() < 0.2 * whole.abs().max()
    fresh = LoRA(path=folder, rank=2, quantization="4bit", target_modules=["q_proj"])
    fresh.load(CPU)
    fresh.settle()
    fresh.load_state_dict(student.state_dict())  # strictly, as a run that goes on does
    assert torch.equal(
        fresh.model.model.layers[1].self_attn.q_proj.lora_B["default"].weight, layer.lora_B["default"].weight
    )
