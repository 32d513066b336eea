"""Layers go by what a model loses without them, which is measured as if they had gone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from kdcli.data.jsonl import Jsonl
from kdcli.errors import ConfigError
from kdcli.ops.head import Head
from kdcli.student.hf import HFStudent
from kdcli.student_init._calibrate import Calibration, evaluating, nats_per_target
from kdcli.student_init._ranking import angular_distance, block_influence, kept_layers, losses_without
from kdcli.student_init._surgery import cut
from kdcli.student_init.drop_layers import DropLayers
from kdcli.teacher.hf import HFTeacher
from kdcli.teacher.hf_sharded import HFShardedTeacher
from kdcli.teacher.none import NoTeacher
from kdcli.text.collate import collate
from tests import families

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {"rows": 4, "heldout": 4, "max_length": 16}
REAL = len(families.WORDS)


def _rows(data: Jsonl) -> list[Any]:
    return Calibration(data=data, **SMALL).to_rank_by(families.tokenizer(), CPU)


def _idle(model: Any, layer: int) -> Any:
    """The model with one layer that adds nothing to what passes through it."""
    block = model.model.layers[layer]
    with torch.no_grad():
        block.self_attn.o_proj.weight.zero_()
        block.mlp.down_proj.weight.zero_()
    return model


@pytest.mark.parametrize("family", list(families.FAMILIES))
def test_the_loss_without_a_layer_is_that_of_the_cut_model(family: str, data: Jsonl) -> None:
    model, rows = families.model(family), _rows(data)
    with evaluating(model):
        losses = losses_without(model, Head.of(model, REAL), rows)
        further = losses_without(model, Head.of(model, REAL), rows, {1})
    for layer in range(4):
        left = [other for other in range(4) if other != layer]
        assert math.isclose(losses[layer], nats_per_target(cut(model, left), families.tokenizer(), rows), rel_tol=1e-5)
    left = cut(model, [0, 3])
    assert math.isclose(further[2], nats_per_target(left, families.tokenizer(), rows), rel_tol=1e-5)
    assert further.keys() == {0, 2, 3}


def test_measuring_leaves_the_model_as_it_was(data: Jsonl) -> None:
    model = families.model("llama").train()
    before = families.logits(model, families.ids())
    kept_layers(model, REAL, _rows(data), 2, importance="leave_one_out", greedy=True)
    assert model.training
    assert torch.equal(families.logits(model, families.ids()), before)
    assert not any("forward" in layer.__dict__ or layer._forward_hooks for layer in model.model.layers)


@pytest.mark.parametrize("importance", ["leave_one_out", "block_influence", "angular"])
def test_a_layer_that_does_nothing_goes_first_and_costs_nothing(importance: Any, data: Jsonl) -> None:
    """The layers of a random model are none that it needs, so by leave_one_out the loss without the idle one is only
    the whole model's, and not the least."""
    model, rows = _idle(families.model("llama"), 2), _rows(data)
    whole = nats_per_target(model, families.tokenizer(), rows)
    if importance == "leave_one_out":
        with evaluating(model):
            assert math.isclose(losses_without(model, Head.of(model, REAL), rows)[2], whole, rel_tol=1e-6)
        return
    assert kept_layers(model, REAL, rows, 3, importance=importance) == [0, 1, 3]
    assert nats_per_target(cut(model, [0, 1, 3]), families.tokenizer(), rows) == whole


def test_greedy_ranks_what_is_left_anew(data: Jsonl) -> None:
    """The reference cuts for every choice."""
    model, rows, left = families.model("llama", seed=3), _rows(data), [0, 1, 2, 3]
    while len(left) > 1:
        without = [[other for other in left if other != layer] for layer in left]
        left = min(without, key=lambda layers: nats_per_target(cut(model, layers), families.tokenizer(), rows))
    assert kept_layers(model, REAL, rows, 1, importance="leave_one_out", greedy=True) == left


def test_one_shot_keeps_the_layers_whose_absence_costs_most(data: Jsonl) -> None:
    model, rows = families.model("llama", seed=1), _rows(data)
    with evaluating(model):
        losses = losses_without(model, Head.of(model, REAL), rows)
    expected = sorted(sorted(losses, key=lambda layer: losses[layer])[2:])
    assert kept_layers(model, REAL, rows, 2, importance="leave_one_out") == expected


def test_angular_takes_out_neighbours(data: Jsonl) -> None:
    model = _idle(_idle(families.model("llama"), 1), 2)
    with evaluating(model):
        distances = angular_distance(model, _rows(data), 2)
    assert distances[1] < 1e-4 < min(distances[0], distances[2])
    assert kept_layers(model, REAL, _rows(data), 2, importance="angular") == [0, 3]


def test_block_influence_is_between_zero_and_two(data: Jsonl) -> None:
    model = families.model("qwen3")
    with evaluating(model):
        scores = block_influence(model, _rows(data))
    assert all(0 < score < 2 for score in scores.values())


def test_padding_is_not_measured(data: Jsonl) -> None:
    """One row at a time, there is none."""
    model, calibration = families.model("llama"), Calibration(data=data, **SMALL)
    rows, tokenizer = calibration._drawn(families.tokenizer())[:4], families.tokenizer()
    alone = [collate([row], pad_id=1) for row in rows]
    with evaluating(model):
        together = block_influence(model, _rows(data))
        assert block_influence(model, alone) == pytest.approx(together, rel=1e-6)
    assert math.isclose(
        nats_per_target(model, tokenizer, alone), nats_per_target(model, tokenizer, _rows(data)), rel_tol=1e-5
    )


def test_held_out_rows_are_others_of_all_domains(data: Jsonl) -> None:
    calibration = Calibration(data=data, **SMALL)
    ranked, held_out = (
        [row for batch in getattr(calibration, name)(families.tokenizer(), CPU) for row in batch.row]
        for name in ("to_rank_by", "held_out")
    )
    assert len(ranked) == len(held_out) == 4
    assert not set(ranked) & set(held_out)
    domains = [batch.domain for batch in calibration.held_out(families.tokenizer(), CPU)]
    assert domains == [["a", "b", "a", "b"]]


def test_the_student_is_cut_and_told(tmp_path: Path, data: Jsonl, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "kdcli")
    teacher = HFTeacher(path=families.folder(tmp_path / "teacher"), dtype="float32")
    student = HFStudent()
    init = DropLayers(keep=2, data=data, **SMALL)
    before = init.shape(student, teacher)
    teacher.load(CPU)
    student.load(CPU)
    init(student, teacher)
    assert before == student.shape()
    again = DropLayers(keep=2, data=data, **SMALL)
    again(HFStudent(), teacher)
    assert again.kept == init.kept
    expected = cut(teacher.model, init.kept)
    assert torch.equal(families.logits(student.model, families.ids()), families.logits(expected, families.ids()))
    line = next(message for message in caplog.messages if message.startswith("student: 2 layers"))
    assert "cut from 4 layers" in line
    assert "held-out perplexity" in line


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"keep": 0}, r"student_init\.keep is 0; the model has 4 layers, so give 1 to 4"),
        ({"keep": 5}, r"student_init\.keep is 5"),
        ({"keep": 2, "rows": 10}, r"student_init\.data has 12 rows, fewer than .* = 10 \+ 4; lower them"),
        ({"keep": 2, "rows": 0}, r"student_init\.rows is 0; give at least 1"),
        ({"keep": 2, "importance": "angular", "greedy": True}, r"student_init\.greedy ranks by leave_one_out"),
    ],
)
def test_bad_settings_are_told_before_weights_load(
    settings: dict[str, Any], problem: str, tmp_path: Path, data: Jsonl, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = families.folder(tmp_path / "teacher")
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", None)
    teacher = HFTeacher(path=folder)
    with pytest.raises(ConfigError, match=problem):
        DropLayers(data=data, **(SMALL | settings)).shape(HFStudent(), teacher)


def test_data_that_are_not_there_are_told_before_weights_load(tmp_path: Path) -> None:
    teacher = HFTeacher(path=families.folder(tmp_path / "teacher"))
    with pytest.raises(ConfigError, match="there is no such file"):
        DropLayers(keep=2, data=Jsonl(path=str(tmp_path / "none"))).shape(HFStudent(), teacher)


def test_a_model_that_is_not_whole_is_refused(tmp_path: Path, data: Jsonl) -> None:
    teacher = HFTeacher(path=families.folder(tmp_path / "teacher"))
    teacher.load(CPU)
    teacher.model.to("meta")
    with pytest.raises(ConfigError, match="HFTeacher's are not in memory; name the same model"):
        DropLayers(keep=2, data=data, **SMALL)(HFStudent(), teacher)
    with pytest.raises(ConfigError, match="needs a model to cut"):
        DropLayers(keep=2, data=data, **SMALL).shape(HFStudent(), NoTeacher())


def test_a_teacher_that_is_not_whole_is_told_before_weights_load(tmp_path: Path, data: Jsonl) -> None:
    """As it is split over ranks or kept elsewhere; one that is quantized has no weights to cut either."""
    folder = families.folder(tmp_path / "teacher")
    quantized = HFTeacher(path=folder)
    quantized.quantization = "4bit"
    for teacher in (HFShardedTeacher(path=folder), quantized):
        with pytest.raises(ConfigError, match=r"set teacher=hf, or student\.path \(now there is a HF\w+, which is not"):
            DropLayers(keep=2, data=data, **SMALL).shape(HFStudent(), teacher)
    student = HFStudent(path=folder)
    assert DropLayers(keep=2, data=data, **SMALL).shape(student, HFShardedTeacher(path=folder)) is not None
