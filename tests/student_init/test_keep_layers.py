"""A cut model is the teacher's computation with layers left out, in every family."""

import random
from pathlib import Path

import numpy
import pytest
import torch

from kdcli.api import Student
from kdcli.errors import ConfigError
from kdcli.store.models import load_model
from kdcli.student.hf import HFStudent
from kdcli.student_init._surgery import cut
from kdcli.student_init.keep_layers import KeepLayers
from kdcli.teacher.hf import HFTeacher
from kdcli.teacher.none import NoTeacher
from tests import families

CPU = torch.device("cpu")
EVERY = pytest.mark.parametrize("family", list(families.FAMILIES))


def _layers(model) -> torch.nn.ModuleList:
    stacks = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList)]
    return stacks[0]


@EVERY
def test_keeping_all_layers_changes_nothing(family: str) -> None:
    teacher, ids = families.model(family), families.ids()
    assert torch.equal(families.logits(cut(teacher, [0, 1, 2, 3]), ids), families.logits(teacher, ids))


@EVERY
@pytest.mark.parametrize("layers", [[1], [0, 3], [1, 2, 3]])
def test_a_cut_model_skips_exactly_the_other_layers(family: str, layers: list[int]) -> None:
    """The reference: the teacher itself with the other layers replaced by ones that hand their input on."""
    teacher, ids = families.model(family), families.ids()
    student = cut(teacher, layers)
    stack = _layers(teacher)
    for index in set(range(4)) - set(layers):
        stack[index].forward = lambda hidden_states, *_, **__: hidden_states  # type: ignore[method-assign]
    torch.testing.assert_close(families.logits(student, ids), families.logits(teacher, ids), rtol=0, atol=0)


@EVERY
def test_a_cut_model_survives_saving(family: str, tmp_path: Path) -> None:
    student, ids = cut(families.model(family), [0, 2, 3]), families.ids()
    student.save_pretrained(tmp_path)
    again = load_model(str(tmp_path))
    assert again.config.num_hidden_layers == 3
    assert torch.equal(families.logits(again, ids), families.logits(student, ids))


@EVERY
def test_a_cut_model_generates_with_its_cache(family: str) -> None:
    """Cached generation depends on every layer knowing its own number."""
    student = cut(families.model(family), [1, 3])
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    with_cache = student.generate(families.ids(rows=1), use_cache=True, **options)
    assert torch.equal(with_cache, student.generate(families.ids(rows=1), use_cache=False, **options))
    assert with_cache.shape == (1, 18)


@EVERY
def test_nothing_is_shared_with_the_teacher(family: str) -> None:
    teacher = families.model(family)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    with torch.no_grad():
        for parameter in cut(teacher, [0, 1, 2, 3]).parameters():
            parameter.zero_()
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert teacher.config.num_hidden_layers == 4


@pytest.mark.parametrize("family", ["llama_tied", "gemma3_text", "gpt2"])
def test_tied_heads_stay_tied(family: str) -> None:
    student = cut(families.model(family), [0, 1])
    assert student.get_output_embeddings().weight is student.get_input_embeddings().weight


def test_lists_with_an_entry_per_layer_are_cut_alike() -> None:
    student = cut(families.model("gemma3_text"), [1, 2])
    assert student.config.layer_types == ["full_attention", "sliding_attention"]


def test_layers_keep_the_order_given() -> None:
    teacher = families.model("llama")
    student = cut(teacher, [2, 0])
    first = student.model.layers[0].self_attn
    assert first.layer_idx == 0
    assert torch.equal(first.q_proj.weight, teacher.model.layers[2].self_attn.q_proj.weight)


@pytest.mark.parametrize(
    ("layers", "problem"),
    [
        ([], "it is empty"),
        ([0, 4], "there is no layer 4"),
        ([-1], "there is no layer -1"),
        ([1, 2, 1], "1 stands twice"),
    ],
)
def test_wrong_layers_are_named(layers: list[int], problem: str) -> None:
    with pytest.raises(ConfigError, match=f"{problem}; name each layer to keep once, from 0 to 3"):
        cut(families.model("llama"), layers)


def test_random_numbers_are_left_alone() -> None:
    teacher = families.model("llama")
    states = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()  # type: ignore[index]
    cut(teacher, [0, 1])
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (random.getstate(), numpy.random.get_state()[1].tolist())  # type: ignore[index]


def _loaded(student: Student) -> Student:
    student.load(CPU)
    return student


def test_the_student_is_cut_from_the_teacher(tmp_path: Path) -> None:
    teacher = HFTeacher(path=families.folder(tmp_path), dtype="bfloat16")
    teacher.load(CPU)
    student = _loaded(HFStudent())
    KeepLayers(layers=[0, 2])(student, teacher)
    assert student.tokenizer is teacher.tokenizer
    assert student.head.vocab_size == len(families.WORDS)
    assert {p.dtype for p in student.model.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in student.model.parameters())
    assert not any(p.requires_grad for p in teacher.model.parameters())
    kept = student.model.model.layers[1].mlp.up_proj.weight
    assert torch.equal(kept, teacher.model.model.layers[2].mlp.up_proj.weight.float())


def test_a_student_with_its_own_path_is_cut_itself(tmp_path: Path) -> None:
    student = _loaded(HFStudent(path=families.folder(tmp_path)))
    expected = student.model.model.layers[3].mlp.up_proj.weight
    KeepLayers(layers=[3])(student, NoTeacher())
    assert torch.equal(student.model.model.layers[0].mlp.up_proj.weight, expected)
    assert student.head.weight is student.model.lm_head.weight


def test_no_model_to_cut_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"set teacher=hf, or student\.path"):
        KeepLayers(layers=[0])(_loaded(HFStudent()), NoTeacher())


def test_sizes_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "kdcli")
    KeepLayers(layers=[0])(_loaded(HFStudent(path=families.folder(tmp_path))), NoTeacher())
    assert "student: 1 layers, 0.01M parameters, cut from 4 layers, 0.03M parameters" in caplog.messages
