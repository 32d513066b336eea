"""A narrower model is the model without the units that went: exactly so where they did nothing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kdcli.data.jsonl import Jsonl
from kdcli.errors import ConfigError
from kdcli.store.models import load_model
from kdcli.student.hf import HFStudent
from kdcli.student_init._calibrate import Calibration
from kdcli.student_init._narrow import Kept, activity, chosen, narrowed
from kdcli.student_init._surgery import cut
from kdcli.student_init._units import Widths
from kdcli.student_init.prune_width import PruneWidth
from kdcli.student_init.subclone import Subclone
from kdcli.teacher.hf import HFTeacher
from tests import families

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {"rows": 4, "heldout": 4, "max_length": 16}
FAMILIES = ["llama", "llama_tied", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"]
NARROW = Widths(hidden=20, ffn=31, heads=2, kv_heads=1, head_width=8)
EVERY = pytest.mark.parametrize("family", FAMILIES)


def _model(family: str, **changes: Any) -> Any:
    """In float64, with norms that are not all one, and next to nothing added to what norms divide by."""
    changes = {"rms_norm_eps": 1e-12} | changes
    if family in families.FAMILIES:
        model = families.model(family, **changes)
    else:
        settings = families.FAMILIES["llama"] | {"vocab_size": families.ROWS, "pad_token_id": 1} | changes
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return cut(model, range(4), dtype="float64")


def _rows(data: Jsonl) -> list[Any]:
    return Calibration(data=data, **SMALL).to_rank_by(families.tokenizer(), CPU)


def _random_units(seed: int = 0) -> Kept:
    """Of 4 heads in 2 groups, 48 FFN and 32 hidden units."""
    torch.manual_seed(seed)

    def some(number: int, total: int) -> torch.Tensor:
        return torch.randperm(total)[:number].sort().values

    groups = [some(1, 2) for _ in range(4)]
    return Kept(
        hidden=some(20, 32),
        heads=[2 * group + torch.arange(2) for group in groups],
        kv_heads=groups,
        ffn=[some(31, 48) for _ in range(4)],
    )


def _without_effect(model: Any, kept: Kept) -> Any:
    """The model, in which the other units do nothing: what they are read by is 0."""
    gone = torch.ones(32, dtype=torch.bool)
    gone[kept.hidden] = False
    with torch.no_grad():
        model.get_input_embeddings().weight[:, gone] = 0
        for layer, block in enumerate(model.model.layers):
            for projection in (block.self_attn.o_proj, block.mlp.down_proj):
                projection.weight[gone] = 0
            for projection, units in (
                (block.self_attn.o_proj, _wide(kept.heads[layer])),
                (block.mlp.down_proj, kept.ffn[layer]),
            ):
                idle = torch.ones(projection.weight.shape[1], dtype=torch.bool)
                idle[units] = False
                projection.weight[:, idle] = 0
    return model


def _wide(heads: torch.Tensor) -> torch.Tensor:
    return (heads[:, None] * 8 + torch.arange(8)).flatten()


@EVERY
def test_keeping_everything_changes_nothing(family: str, data: Jsonl) -> None:
    model = _model(family)
    widths = Widths.of(model.config)
    everything = chosen(activity(model, _rows(data), "mean"), widths, widths)
    for scaling in ("norms", "fan_in"):
        same = narrowed(model, everything, widths, _rows(data), scaling=scaling, dtype="float64")
        assert torch.equal(families.logits(same, families.ids()), families.logits(model, families.ids()))


@EVERY
def test_units_without_effect_can_go(family: str, data: Jsonl) -> None:
    kept = _random_units()
    model = _without_effect(_model(family), kept)
    student = narrowed(model, kept, NARROW, _rows(data), scaling="norms", dtype="float64")
    assert student.model.layers[0].mlp.gate_proj.weight.shape == (31, 20)
    assert student.model.layers[0].self_attn.o_proj.weight.shape == (20, 16)
    torch.testing.assert_close(
        families.logits(student, families.ids()), families.logits(model, families.ids()), rtol=1e-4, atol=1e-4
    )


@EVERY
def test_a_narrow_model_survives_saving(family: str, data: Jsonl, tmp_path: Path) -> None:
    student = narrowed(_model(family), _random_units(), NARROW, _rows(data), scaling="norms", dtype="float32")
    student.save_pretrained(tmp_path)
    again = load_model(str(tmp_path))
    assert again.config.head_dim == 8
    assert torch.equal(families.logits(again, families.ids()), families.logits(student, families.ids()))


def test_silent_units_are_the_ones_that_go(data: Jsonl) -> None:
    """Of one group, one hidden unit and two FFN units nothing is heard; by either measure these go."""
    model = _model("qwen3")
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 5] = 0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[5] = 0
            layer.mlp.down_proj.weight[5] = 0
            layer.self_attn.v_proj.weight[8:] = 0
            layer.mlp.up_proj.weight[[3, 40]] = 0
    widths = Widths.of(model.config).narrowed(hidden=31, ffn=46, kv_heads=1)
    for aggregate in ("mean", "l2"):
        kept = chosen(activity(model, _rows(data), aggregate), Widths.of(model.config), widths)
        assert set(range(32)) - set(kept.hidden.tolist()) == {5}
        assert [set(range(48)) - set(units.tolist()) for units in kept.ffn] == [{3, 40}] * 4
        assert [heads.tolist() for heads in kept.heads] == [[0, 1]] * 4
        student = narrowed(model, kept, widths, _rows(data), scaling="norms", dtype="float64")
        torch.testing.assert_close(
            families.logits(student, families.ids()), families.logits(model, families.ids()), rtol=1e-4, atol=1e-4
        )


def test_activity_is_what_projections_read(data: Jsonl) -> None:
    """The first layer's, by hand: silu(gate) * up of the normed embeddings after attention."""
    model, rows = _model("llama"), _rows(data)
    sums, heads, tokens = torch.zeros(48, dtype=torch.float64), torch.zeros(4, dtype=torch.float64), 0
    layer = model.model.layers[0]
    for batch in rows:
        for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True):
            seen: list[Any] = []
            handle = layer.self_attn.o_proj.register_forward_pre_hook(lambda _, given, seen=seen: seen.append(given[0]))
            with torch.no_grad():
                states = model(input_ids=ids[mask][None], output_hidden_states=True).hidden_states
                after = states[0] + layer.self_attn.o_proj(seen[0])
                normed = layer.post_attention_layernorm(after)
                mlp = layer.mlp
                units = torch.nn.functional.silu(mlp.gate_proj(normed)) * mlp.up_proj(normed)
            handle.remove()
            sums += units[0].abs().sum(dim=0)
            heads += seen[0][0].view(-1, 4, 8).norm(dim=-1).sum(dim=0)
            tokens += int(mask.sum())
    found = activity(model, rows, "mean")
    torch.testing.assert_close(found.ffn[0], sums / tokens)
    torch.testing.assert_close(found.heads[0], heads / tokens)


def test_heads_stay_with_their_group(data: Jsonl) -> None:
    model = _model("llama", hidden_size=48, num_attention_heads=6, num_key_value_heads=2)
    widths = Widths.of(model.config).narrowed(heads=4)
    kept = chosen(activity(model, _rows(data), "mean"), Widths.of(model.config), widths)
    for heads, groups in zip(kept.heads, kept.kv_heads, strict=True):
        assert groups.tolist() == [0, 1]
        assert (heads // 3).tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"heads": 2}, (2, 2)),
        ({"kv_heads": 1}, (2, 1)),
        ({"heads": 1, "kv_heads": 1}, (1, 1)),
        ({}, (4, 2)),
    ],
)
def test_heads_and_groups_go_together(asked: dict[str, int], expected: tuple[int, int]) -> None:
    widths = Widths.of(families.config("llama")).narrowed(**asked)
    assert (widths.heads, widths.kv_heads) == expected


def test_without_groups_heads_go_with_their_keys() -> None:
    widths = Widths.of(families.config("llama", num_key_value_heads=4)).narrowed(heads=3)
    assert (widths.heads, widths.kv_heads) == (3, 3)


@torch.no_grad()
def test_subcloning_keeps_the_spread_of_what_comes_out(data: Jsonl) -> None:
    """sqrt(d_t / d_s): of a projection of independent weights, the outputs of half of the inputs spread as before."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            "llama", hidden_size=256, intermediate_size=512, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=4, vocab_size=families.ROWS, initializer_range=0.05, pad_token_id=1,
        )
    ).eval()  # fmt: skip
    widths = Widths.of(model.config).narrowed(hidden=128, ffn=256)
    kept = chosen(activity(model, _rows(data), "mean"), Widths.of(model.config), widths)
    student = narrowed(model, kept, widths, _rows(data), scaling="fan_in", dtype="float32")
    mlps = [one.model.layers[0].mlp for one in (model, student)]
    inputs = torch.randn(64, 256)
    before, after = (
        mlp.gate_proj(x).std().detach() for mlp, x in zip(mlps, (inputs, inputs[:, kept.hidden]), strict=True)
    )
    assert math.isclose(float(before), float(after), rel_tol=0.05)
    rows = kept.ffn[0][:, None]
    expected = mlps[0].up_proj.weight[rows, kept.hidden] * math.sqrt(2)
    torch.testing.assert_close(mlps[1].up_proj.weight, expected)
    torch.testing.assert_close(student.model.norm.weight, model.model.norm.weight[kept.hidden] * math.sqrt(2))


@pytest.mark.parametrize("option", [PruneWidth, Subclone])
def test_the_student_is_narrowed_and_told(
    option: Any, tmp_path: Path, data: Jsonl, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "kdcli")
    teacher, student = HFTeacher(path=families.folder(tmp_path / "teacher", "mistral")), HFStudent()
    init = option(data=data, hidden=24, ffn=40, kv_heads=1, layers=3, **SMALL)
    before = init.shape(student, teacher)
    teacher.load(CPU)
    student.load(CPU)
    init(student, teacher)
    assert before == student.shape()
    assert (before.layers, before.width, before.heads, before.kv_heads, before.head_width) == (3, 24, 2, 1, 8)
    assert {parameter.dtype for parameter in student.model.parameters()} == {torch.float32}
    assert any("cut from 4 layers" in line and "held-out perplexity" in line for line in caplog.messages)
    again = HFStudent()
    option(data=data, hidden=24, ffn=40, kv_heads=1, layers=3, **SMALL)(again, teacher)
    assert torch.equal(families.logits(again.model, families.ids()), families.logits(student.model, families.ids()))


@pytest.mark.parametrize(
    ("family", "asked", "problem"),
    [
        ("llama", {}, r"student_init=prune_width is told nothing to cut; give hidden, ffn, heads, kv_heads or layers"),
        ("llama", {"hidden": 33}, r"student_init\.hidden is 33; the model has 32, so give 1 to 32"),
        ("llama", {"ffn": 0}, r"student_init\.ffn is 0; the model has 48"),
        ("llama", {"heads": 3}, r"3 heads in 2 groups of equal size cannot be cut from 4 in 2"),
        ("llama", {"heads": 4, "kv_heads": 1}, r"4 heads in 1 groups of equal size cannot be cut from 4 in 2"),
        ("llama", {"layers": 5}, r"student_init\.layers is 5; the model has 4 layers"),
        ("gpt2", {"hidden": 16}, r"GPT2\w* has .*how to make that narrower is not known|gpt2 has no one"),
        ("olmo2", {"hidden": 16}, r"Olmo2ForCausalLM has a weight model.layers.0.self_attn.q_norm.weight"),
        ("mixtral", {"hidden": 16}, r"MixtralForCausalLM has a weight model.layers.0.mlp"),
    ],
)
def test_bad_sizes_are_told_before_weights_load(
    family: str, asked: dict[str, Any], problem: str, tmp_path: Path, data: Jsonl
) -> None:
    settings = families.FAMILIES["llama"] if family not in families.FAMILIES else families.FAMILIES[family]
    AutoConfig.for_model(family, **(settings | {"vocab_size": families.ROWS})).save_pretrained(tmp_path)
    families.tokenizer().save_pretrained(tmp_path)  # and no weights
    with pytest.raises(ConfigError, match=problem):
        PruneWidth(data=data, **SMALL, **asked).shape(HFStudent(), HFTeacher(path=str(tmp_path)))
