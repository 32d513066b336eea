"""The teacher's signal: the logits transformers gives, for real ids only, without gradients or [B, T, V]."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kdcli.api import Batch, Need, TeacherView
from kdcli.teacher.hf import HFTeacher
from kdcli.teacher.none import NoTeacher
from tests import families

CPU = torch.device("cpu")
DENSE = Need.DISTRIBUTION


def _batch(rows: int = 3, length: int = 12) -> Batch:
    """Right-padded rows of different lengths; the first two targets of each are a prompt."""
    ids = families.ids(rows=rows, length=length + 1)
    lengths = torch.tensor([length - 2 * row for row in range(rows)])
    attention = torch.arange(length) < lengths[:, None]
    mask = attention & (torch.arange(length) >= 2)
    return Batch(
        input_ids=ids[:, :-1].masked_fill(~attention, 1),
        targets=ids[:, 1:],
        mask=mask,
        attention_mask=attention,
        segment=torch.arange(rows)[:, None].expand(rows, length).masked_fill(~attention, -1),
        weight=torch.ones(rows),
    )


def _teacher(folder: Path, family: str = "llama", **settings: Any) -> HFTeacher:
    teacher = HFTeacher(path=families.folder(folder, family), **({"dtype": "float32"} | settings))
    teacher.load(CPU)
    return teacher


def _logits(signal) -> torch.Tensor:
    return signal.head(signal.hidden)


@pytest.mark.parametrize("family", list(families.FAMILIES))
def test_signal_gives_the_models_logits_over_real_ids(family: str, tmp_path: Path) -> None:
    teacher, batch = _teacher(tmp_path, family), _batch()
    signal = teacher.annotate(batch, DENSE)
    with torch.no_grad():
        expected = teacher.model(**batch.model_inputs()).logits
    assert expected.shape[-1] == families.ROWS
    found, real = _logits(signal), len(teacher.tokenizer)
    assert found.shape[-1] == real < families.ROWS
    torch.testing.assert_close(found[batch.mask], expected[batch.mask][:, :real])


def test_packed_rows_score_as_if_alone(tmp_path: Path) -> None:
    teacher = _teacher(tmp_path)
    ids = families.ids(rows=2, length=6)
    packed = Batch(
        input_ids=ids.reshape(1, -1),
        targets=ids.reshape(1, -1).roll(-1, 1),
        mask=torch.ones(1, 12, dtype=torch.bool),
        attention_mask=torch.ones(1, 12, dtype=torch.bool),
        segment=torch.arange(2).repeat_interleave(6)[None],
        weight=torch.ones(2),
        position_ids=torch.arange(6).repeat(2)[None],
    )
    alone = torch.cat([families.logits(teacher.model, row[None]) for row in ids], dim=1)
    torch.testing.assert_close(_logits(teacher.annotate(packed, DENSE)), alone[..., :40], rtol=1e-5, atol=1e-5)


def test_nothing_needed_costs_nothing(tmp_path: Path) -> None:
    teacher = HFTeacher(path=str(tmp_path))  # no weights are loaded
    signal = teacher.annotate(_batch(), Need.NOTHING)
    assert signal.hidden is None
    assert signal.head is None


def test_teacher_is_frozen_and_evaluates(tmp_path: Path) -> None:
    """Also with gradients on, and for a model whose config has dropout."""
    teacher = HFTeacher(path=families.folder(tmp_path, "gpt2", resid_pdrop=0.5, embd_pdrop=0.5), dtype="float32")
    teacher.load(CPU)
    assert not any(p.requires_grad for p in teacher.model.parameters())
    with torch.enable_grad():
        first, second = (teacher.annotate(_batch(), DENSE | Need.LOGPROBS | Need.HIDDEN) for _ in range(2))
    assert torch.equal(first.hidden, second.hidden)
    assert not first.hidden.requires_grad
    assert first.head is not None
    assert not first.head.weight.requires_grad


def test_logprobs_are_those_of_the_targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdcli.teacher._signal.chunk_size", lambda *_: 4)
    teacher, batch = _teacher(tmp_path), _batch()
    signal = teacher.annotate(batch, Need.LOGPROBS)
    expected = torch.log_softmax(_logits(signal), -1).gather(-1, batch.targets.unsqueeze(-1))[..., 0]
    assert signal.logprobs is not None
    torch.testing.assert_close(signal.logprobs, expected * batch.mask)


def test_a_batch_without_a_target_has_logprobs(tmp_path: Path) -> None:
    batch = _batch()
    signal = _teacher(tmp_path).annotate(replace(batch, mask=torch.zeros_like(batch.mask)), Need.LOGPROBS)
    assert signal.logprobs is not None
    assert not signal.logprobs.any()


def test_hidden_states_are_given_per_layer_when_needed(tmp_path: Path) -> None:
    teacher, batch = _teacher(tmp_path), _batch()
    assert teacher.annotate(batch, DENSE).hidden_states is None
    layers = teacher.annotate(batch, Need.HIDDEN).hidden_states
    assert layers is not None
    assert [tuple(layer.shape) for layer in layers] == [(3, 12, 32)] * 5


@pytest.mark.parametrize("needs", [DENSE, DENSE | Need.LOGPROBS, DENSE | Need.HIDDEN])
def test_no_tensor_of_tokens_by_vocabulary_is_made(
    needs: Need, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdcli.teacher._signal.chunk_size", lambda *_: 8)
    teacher, batch = HFTeacher(path=families.folder(tmp_path, intermediate_size=24), dtype="float32"), _batch()
    teacher.load(CPU)
    largest = 0  # rows of the largest tensor as wide as the vocabulary, but for the head's own [D, V]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            outputs = result if isinstance(result, tuple | list) else (result,)
            made = [t for t in outputs if isinstance(t, torch.Tensor) and t.dim() and t.shape[-1] in (40, 48)]
            largest = max([largest, *(t.numel() // t.shape[-1] for t in made if t.shape != (32, 40))])
            return result

    with Watch():
        teacher.annotate(batch, needs)
    assert largest == (8 if Need.LOGPROBS in needs else 0)


def test_arithmetic_is_the_teachers_own_inside_autocast(tmp_path: Path) -> None:
    teacher, batch = _teacher(tmp_path), _batch()
    alone = teacher.annotate(batch, DENSE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = teacher.annotate(batch, DENSE)
    assert torch.equal(alone.hidden, inside.hidden)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_close_to_float32(dtype: str, tmp_path: Path) -> None:
    batch = _batch()
    exact = _logits(_teacher(tmp_path).annotate(batch, DENSE))
    half = HFTeacher(path=str(tmp_path), dtype=dtype)  # type: ignore[arg-type]
    half.load(CPU)
    signal = half.annotate(batch, DENSE)
    assert signal.hidden.dtype == getattr(torch, dtype)
    assert (_logits(signal) - exact)[batch.mask].abs().mean() < 0.02 * exact.abs().mean()


def test_a_teacher_view_scores_the_students_targets(tmp_path: Path) -> None:
    """The teacher sees two more words in front, and padding: its prediction for target t stands at t + 2."""
    teacher, batch = _teacher(tmp_path), _batch()
    hint = families.ids(seed=1, rows=3, length=2)
    view_ids = torch.cat([hint, batch.input_ids], dim=1)
    attention = torch.cat([torch.ones(3, 2, dtype=torch.bool), batch.attention_mask], dim=1)
    position = (torch.arange(12) + 2).expand(3, 12).masked_fill(~batch.mask, -1)
    view = TeacherView(input_ids=view_ids, attention_mask=attention, position=position)
    found = _logits(teacher.annotate(replace(batch, teacher=view), DENSE))
    with torch.no_grad():
        expected = teacher.model(input_ids=view_ids, attention_mask=attention.long()).logits[:, 2:, :40]
    torch.testing.assert_close(found[batch.mask], expected[batch.mask])
    own = _logits(teacher.annotate(batch, DENSE))
    assert not torch.allclose(found[batch.mask], own[batch.mask])


def test_no_teacher_gives_nothing() -> None:
    teacher = NoTeacher()
    teacher.load(CPU)
    assert teacher.provides == Need.NOTHING
    assert teacher.load_tokenizer() is None
    assert teacher.annotate(_batch(), Need.NOTHING).hidden is None
    with pytest.raises(AssertionError):
        teacher.annotate(_batch(), DENSE)
