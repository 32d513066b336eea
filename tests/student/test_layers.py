"""What the layers compute, of students and teachers: equal to what the model itself does with it."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kdcli.api import Batch, Need, StudentOutput, TeacherView
from kdcli.errors import ConfigError
from kdcli.store.layers import stack
from kdcli.student.hf import HFStudent
from kdcli.student_init._surgery import cut
from kdcli.teacher.hf import HFTeacher
from tests import families
from tests.toys import batch as toy_batch

CPU = torch.device("cpu")
ALL = Need.HIDDEN | Need.ATTENTION | Need.RELATIONS
FUSED = {
    "phi3": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "original_max_position_embeddings": 64,
    },
    "gpt_neox": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    },
}
EVERY = [*families.FAMILIES, *FUSED]


@pytest.fixture(autouse=True)
def _more_families(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "FAMILIES", families.FAMILIES | FUSED)


def student(folder: Path, family: str = "llama", attention: str | None = "eager", **changes: Any) -> HFStudent:
    one = HFStudent(path=families.folder(folder, family, **changes), attention=attention)
    one.load(CPU)
    return one


def packed(whole: Batch) -> Batch:
    """All rows behind each other in one, without padding."""
    keep = whole.attention_mask
    names = ("input_ids", "targets", "mask", "segment")
    position = torch.arange(keep.shape[1]).expand_as(keep)[keep][None]
    joined = {name: getattr(whole, name)[keep][None] for name in names}
    return replace(whole, **joined, attention_mask=torch.ones_like(joined["mask"]), position_ids=position)


def tokens(whole: Batch, values: Tensor) -> Tensor:
    return values[whole.attention_mask]


def probabilities(model: Any, relation: Any, rotate: Any) -> Tensor:
    """Attention from queries and keys, in the plainest way: [B, H, T, T]."""
    queries, keys = rotate(relation.queries.transpose(1, 2), relation.keys.transpose(1, 2))
    keys = keys.repeat_interleave(queries.shape[1] // keys.shape[1], dim=1)
    scores = queries @ keys.transpose(-1, -2) / queries.shape[-1] ** 0.5
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(hidden, -torch.inf).softmax(-1)


@pytest.mark.parametrize("family", EVERY)
def test_one_pass_gives_every_layer(family: str, tmp_path: Path) -> None:
    one, batch = student(tmp_path, family), toy_batch(vocab=40)
    states, shape = one.states(batch, ALL), one.shape()
    assert shape is not None
    assert states.hidden_states is not None and states.attentions is not None and states.relations is not None
    assert len(states.hidden_states) == 1 + len(states.attentions) == 1 + len(states.relations) == 5
    assert states.hidden is not None
    assert torch.equal(states.hidden, states.hidden_states[-1])
    torch.testing.assert_close(states.hidden, one(batch))
    assert {tuple(layer.shape) for layer in states.hidden_states} == {(4, 12, 32)}
    assert {tuple(layer.shape) for layer in states.attentions} == {(4, shape.heads, 12, 12)}
    for relation in states.relations:
        assert relation.queries.shape == (4, 12, shape.heads, shape.head_width)
        assert relation.keys.shape == relation.values.shape == (4, 12, shape.kv_heads, shape.head_width)
    assert states.embedding is one.model.get_input_embeddings().weight


def test_nothing_more_than_asked_is_given(tmp_path: Path) -> None:
    states = student(tmp_path, attention=None).states(toy_batch(vocab=40), Need.NOTHING)
    assert states.hidden is not None
    assert [states.hidden_states, states.attentions, states.relations, states.embedding] == [None] * 4


@pytest.mark.parametrize("family", EVERY)
def test_a_middle_state_is_what_its_layer_hands_on(family: str, tmp_path: Path) -> None:
    """Of a model cut after layer 2, the state that its final norm sees."""
    one, batch = student(tmp_path, family), toy_batch(vocab=40, rows=1)
    short = cut(one.model, [0, 1], attention="eager").eval()
    norms = [module for name, module in short.base_model.named_children() if "norm" in name or name == "ln_f"]
    seen: list[Tensor] = []
    norms[-1].register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    with torch.no_grad():
        short.base_model(**batch.model_inputs())
        states = one.states(batch, Need.HIDDEN).hidden_states
    assert states is not None
    torch.testing.assert_close(states[2], seen[0])


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "gpt_neox"])
def test_attention_follows_from_queries_and_keys(family: str, tmp_path: Path) -> None:
    """So they are not mixed up: rotated and compared, they give the model's own probabilities."""
    one, batch = student(tmp_path, family), toy_batch(vocab=40, rows=1)
    batch = replace(batch, attention_mask=torch.ones_like(batch.mask))
    with torch.no_grad():
        states = one.states(batch, ALL)
    assert states.attentions is not None and states.relations is not None

    def rotate(queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        if family == "gpt2":
            return queries, keys
        module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        cos, sin = one.model.base_model.rotary_emb(queries, torch.arange(12)[None])
        return module.apply_rotary_pos_emb(queries, keys, cos, sin)

    for attention, relation in zip(states.attentions, states.relations, strict=True):
        torch.testing.assert_close(probabilities(one.model, relation, rotate), attention, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", EVERY)
def test_values_are_the_third_part(family: str, tmp_path: Path) -> None:
    """The first token attends to itself alone, so what its attention adds is its values through the output matrix."""
    one, batch = student(tmp_path, family), toy_batch(vocab=40, rows=1)
    outputs: list[Tensor] = []
    names = ("o_proj", "c_proj", "dense")
    first = stack(one.model)[1][0]
    attention = next(m for n, m in first.named_children() if n in ("attn", "self_attn", "attention"))
    projection = next(getattr(attention, name) for name in names if hasattr(attention, name))
    projection.register_forward_pre_hook(lambda module, given: outputs.append(given[0]))
    with torch.no_grad():
        relations = one.states(batch, Need.RELATIONS).relations
    assert relations is not None
    values = relations[0].values[0, 0]
    repeated = values.repeat_interleave(relations[0].queries.shape[2] // values.shape[0], dim=0)
    torch.testing.assert_close(outputs[0][0, 0], repeated.flatten())


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "gemma3_text", "phi3", "gpt_neox"])
def test_packed_rows_see_what_they_see_alone(family: str, tmp_path: Path) -> None:
    one, batch = student(tmp_path, family), toy_batch(vocab=40)
    with torch.no_grad():
        alone, together = one.states(batch, ALL), one.states(packed(batch), ALL)
    assert alone.hidden_states is not None and together.hidden_states is not None
    for left, right in zip(alone.hidden_states, together.hidden_states, strict=True):
        torch.testing.assert_close(tokens(batch, left), right[0], rtol=1e-4, atol=1e-4)
    assert alone.relations is not None and together.relations is not None
    for left, right in zip(alone.relations, together.relations, strict=True):
        for name in ("queries", "keys", "values"):
            torch.testing.assert_close(
                tokens(batch, getattr(left, name)), getattr(right, name)[0], rtol=1e-4, atol=1e-4
            )
    assert alone.attentions is not None and together.attentions is not None
    begin = 0
    for row, length in enumerate(batch.attention_mask.sum(1).tolist()):
        block = together.attentions[-1][0, :, begin : begin + length, begin : begin + length]
        torch.testing.assert_close(alone.attentions[-1][row, :, :length, :length], block, rtol=1e-4, atol=1e-4)
        begin += length


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_recomputed_layers_give_the_same_gradient(family: str, tmp_path: Path) -> None:
    """Losses on middle layers reach the weights below through activation checkpointing, and none above."""
    quiet: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if family == "gpt2" else {}
    batch, gradients = toy_batch(vocab=40), []
    for recompute in (False, True):
        one = student(tmp_path / str(recompute), family, **quiet)
        if recompute:
            one.model.activation_checkpointing_enable()
        one.train()
        states = one.states(batch, ALL)
        assert states.hidden_states is not None and states.attentions is not None and states.relations is not None
        relation = states.relations[2]
        loss = (states.hidden_states[1] ** 2).sum() + (states.attentions[1] ** 2).sum()
        loss = loss + sum((part**2).sum() for part in (relation.queries, relation.keys, relation.values))
        loss.backward()
        gradients.append({name: p.grad for name, p in one.named_parameters()})
    assert sum(g is not None for g in gradients[0].values()) > 10
    for name, expected in gradients[0].items():
        found = gradients[1][name]
        assert (found is None) == (expected is None), name
        if found is not None:
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_recomputation_without_a_graph_is_refused(tmp_path: Path) -> None:
    one = student(tmp_path)
    one.model.activation_checkpointing_enable({"use_reentrant": True})
    one.train()
    with pytest.raises(ConfigError, match=r"set engine\.activation_checkpointing=false"):
        one.states(toy_batch(vocab=40), Need.RELATIONS)


@pytest.mark.parametrize("attention", [None, "sdpa"])
def test_attention_needs_eager(attention: str | None, tmp_path: Path) -> None:
    one = student(tmp_path, attention=attention)
    assert Need.ATTENTION not in one.provides
    with pytest.raises(ConfigError, match=r"set teacher\.attention=eager and student\.attention=eager"):
        one.states(toy_batch(vocab=40), Need.ATTENTION)


def test_what_is_provided_is_known_before_weights_load() -> None:
    for kind in (HFStudent, HFTeacher):
        assert Need.ATTENTION in kind(path="nowhere", attention="eager").provides
        assert Need.ATTENTION not in kind(path="nowhere", attention="sdpa").provides
        assert Need.RELATIONS | Need.HIDDEN in kind(path="nowhere").provides


def test_unknown_projections_are_refused(tmp_path: Path) -> None:
    one = student(tmp_path)
    for layer in one.model.base_model.layers:
        layer.self_attn.__dict__["_modules"]["odd_proj"] = layer.self_attn._modules.pop("q_proj")
    with pytest.raises(ConfigError, match=r"LlamaForCausalLM: layer 1 has no known queries, keys and values"):
        one.states(toy_batch(vocab=40), Need.RELATIONS)


def test_a_teacher_shows_the_same_layers(tmp_path: Path) -> None:
    batch, folder = toy_batch(vocab=40), families.folder(tmp_path)
    teacher = HFTeacher(path=folder, dtype="float32", attention="eager")
    one = HFStudent(path=folder, attention="eager")
    teacher.load(CPU)
    one.load(CPU)
    signal, states = teacher.annotate(batch, ALL), one.states(batch, ALL)
    for name in ("hidden_states", "attentions"):
        for left, right in zip(getattr(signal, name), getattr(states, name), strict=True):
            torch.testing.assert_close(left, right)
    assert signal.relations is not None and states.relations is not None
    for left, right in zip(signal.relations, states.relations, strict=True):
        torch.testing.assert_close(left.values, right.values)
    assert signal.embedding is not None
    assert not signal.embedding.requires_grad
    assert not any(layer.requires_grad for layer in signal.hidden_states or ())


def view(batch: Batch, **changes: Any) -> TeacherView:
    """Two words more in front."""
    hint = families.ids(seed=1, rows=4, length=2)
    return TeacherView(
        input_ids=torch.cat([hint, batch.input_ids], dim=1),
        attention_mask=torch.cat([torch.ones(4, 2, dtype=torch.bool), batch.attention_mask], dim=1),
        position=(torch.arange(12) + 2).expand(4, 12).masked_fill(~batch.mask, -1),
        **changes,
    )


def test_a_view_moves_states_to_the_students_positions(tmp_path: Path) -> None:
    teacher, batch = HFTeacher(path=families.folder(tmp_path), dtype="float32"), toy_batch(vocab=40)
    teacher.load(CPU)
    seen = replace(batch, teacher=view(batch))
    signal = teacher.annotate(seen, Need.HIDDEN | Need.LOGPROBS)
    with torch.no_grad():
        assert seen.teacher is not None
        whole = teacher.model.base_model(**seen.teacher.model_inputs(), output_hidden_states=True).hidden_states
    assert signal.hidden_states is not None
    for found, layer in zip(signal.hidden_states, whole, strict=True):
        torch.testing.assert_close(found[batch.mask], layer[:, 2:][batch.mask])
        assert not found[~batch.mask].any()
    assert signal.logprobs is not None
    assert signal.own_hidden is None and signal.own_logprobs is None
    hole = replace(seen.teacher, position=seen.teacher.position.clone())
    b, t = batch.mask.nonzero()[0].tolist()
    hole.position[b, t] = -1
    again = teacher.annotate(replace(batch, teacher=hole), Need.LOGPROBS).logprobs
    assert again is not None
    assert again[b, t] == 0 != signal.logprobs[b, t]


@pytest.mark.parametrize("need", [Need.ATTENTION, Need.RELATIONS])
def test_pairs_of_positions_need_equal_ids(need: Need, tmp_path: Path) -> None:
    teacher, batch = HFTeacher(path=families.folder(tmp_path), attention="eager"), toy_batch(vocab=40)
    teacher.load(CPU)
    with pytest.raises(ConfigError, match="leave teacher_prompt out of the data"):
        teacher.annotate(replace(batch, teacher=view(batch)), need)


def test_another_tokenizer_is_scored_at_its_own_positions(tmp_path: Path) -> None:
    teacher, batch = HFTeacher(path=families.folder(tmp_path), dtype="float32"), toy_batch(vocab=40)
    teacher.load(CPU)
    ids = families.ids(seed=3, rows=4, length=14)
    mask = torch.zeros(4, 14, dtype=torch.bool)
    mask[:, 3:9] = True
    foreign = view(batch, targets=ids, mask=mask)
    signal = teacher.annotate(replace(batch, teacher=foreign), Need.HIDDEN | Need.LOGPROBS)
    with torch.no_grad():
        logits = teacher.model(**foreign.model_inputs()).logits[..., :40]
    expected = logits.log_softmax(-1).gather(-1, ids.unsqueeze(-1))[..., 0] * mask
    assert signal.logprobs is None
    assert signal.own_logprobs is not None and signal.own_hidden is not None and signal.head is not None
    torch.testing.assert_close(signal.own_logprobs, expected)
    torch.testing.assert_close(signal.head(signal.own_hidden), logits)
    plain = teacher.annotate(replace(batch, teacher=foreign), Need.HIDDEN)
    assert plain.own_hidden is not None and plain.own_logprobs is None


def test_a_student_output_is_whole(tmp_path: Path) -> None:
    one = student(tmp_path)
    states = one.states(toy_batch(vocab=40), Need.HIDDEN)
    assert isinstance(states, StudentOutput)
    assert states.head is one.head
