"""The one shift: a target is the next token of the same example, packed or not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from kdcli.api import Batch
from kdcli.store.tokens import Row, Segment
from kdcli.text.collate import collate

VOCAB, PAD = 50, 0


@st.composite
def segments(draw: st.DrawFn) -> Segment:
    length = draw(st.integers(1, 9))
    ids = draw(st.lists(st.integers(1, VOCAB - 1), min_size=length, max_size=length))
    mask = draw(st.lists(st.booleans(), min_size=length, max_size=length))
    key, weight = draw(st.text("abc", min_size=1, max_size=3)), draw(st.floats(0, 2, width=32))
    return Segment(ids=np.asarray(ids, np.int32), mask=np.asarray(mask), key=key, weight=weight, domain=f"d{length}")


ROWS = st.lists(
    st.lists(segments(), min_size=1, max_size=3).map(lambda parts: Row(tuple(parts))), min_size=1, max_size=4
)


@given(rows=ROWS)
def test_each_supervised_token_is_the_target_of_the_token_before_it_in_its_example(rows: list[Row]) -> None:
    batch = collate(rows, pad_id=PAD)
    parts = [part for row in rows for part in row.segments]
    for e, part in enumerate(parts):
        here = (batch.segment == e) & batch.mask
        assert batch.targets[here].tolist() == part.ids[1:][part.mask[1:]].tolist()
        before = part.ids[:-1][part.mask[1:]]
        assert batch.input_ids[here].tolist() == before.tolist()


@given(rows=ROWS)
def test_the_tokens_of_a_batch_are_those_of_its_rows(rows: list[Row]) -> None:
    batch = collate(rows, pad_id=PAD)
    for b, row in enumerate(rows):
        tokens = np.concatenate([part.ids for part in row.segments])
        assert batch.input_ids[b, : len(row)].tolist() == tokens.tolist()
        assert batch.attention_mask[b].tolist() == [t < len(row) for t in range(batch.input_ids.shape[1])]
        assert (batch.segment[b, len(row) :] == -1).all()
        assert not batch.mask[b, len(row) :].any()
    parts = [part for row in rows for part in row.segments]
    assert batch.row == [part.key for part in parts]
    assert batch.domain == [part.domain for part in parts]
    assert batch.weight.tolist() == [part.weight for part in parts]


@given(rows=ROWS)
def test_positions_start_again_with_each_example_and_with_the_padding(rows: list[Row]) -> None:
    batch = collate(rows, pad_id=PAD)
    if batch.position_ids is None:
        assert all(len(row.segments) == 1 for row in rows)
        return
    for b in range(len(rows)):
        edges = [t == 0 or batch.segment[b, t] != batch.segment[b, t - 1] for t in range(batch.segment.shape[1])]
        for t, edge in enumerate(edges):
            assert batch.position_ids[b, t] == (0 if edge else batch.position_ids[b, t - 1] + 1)


@given(rows=ROWS)
@settings(max_examples=30)
def test_packing_changes_no_target(rows: list[Row]) -> None:
    packed = collate(rows, pad_id=PAD)
    single = collate([Row((part,)) for row in rows for part in row.segments], pad_id=PAD)

    def pairs(batch: Batch) -> list[tuple[int, int, int]]:
        columns = (batch.segment, batch.input_ids, batch.targets)
        return sorted(zip(*(column[batch.mask].tolist() for column in columns), strict=True))

    assert pairs(packed) == pairs(single)


SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SMALL, sliding_window=4)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL, head_dim=8)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SMALL, head_dim=8, sliding_window=4)),
}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_packed_examples_do_not_see_each_other(family: str, attention: str) -> None:
    """Rows of unequal length, so that one ends in padding; every logit equals the example's own, alone."""
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    model.set_attn_implementation(attention)
    random = np.random.default_rng(0)
    parts = [
        Segment(ids=random.integers(1, VOCAB, length).astype(np.int32), mask=np.ones(length, bool), key=str(length))
        for length in (7, 3, 6, 5, 2)
    ]
    batch = collate([Row(tuple(parts[:3])), Row(tuple(parts[3:]))], pad_id=PAD)
    together = model(**batch.model_inputs()).logits
    alone = [model(**collate([Row((part,))], pad_id=PAD).model_inputs()).logits[0] for part in parts]
    for e, logits in enumerate(alone):
        assert torch.allclose(together[batch.segment == e], logits, atol=1e-5)
    assert together.std() > 0.05  # or the comparison would say nothing


@torch.no_grad()
def test_padding_changes_no_logit() -> None:
    torch.manual_seed(0)
    model = FAMILIES["llama"]().eval()
    parts = [Segment(ids=np.arange(1, n, dtype=np.int32), mask=np.ones(n - 1, bool), key=str(n)) for n in (9, 4)]
    batch = collate([Row((part,)) for part in parts], pad_id=PAD)
    together = model(**batch.model_inputs()).logits
    for b, part in enumerate(parts):
        alone = model(**collate([Row((part,))], pad_id=PAD).model_inputs()).logits[0]
        assert torch.allclose(together[b, : len(part)], alone, atol=1e-5)
