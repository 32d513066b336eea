"""Codecs: what comes back is what was kept, within what they say of themselves."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kdcli.api import TopK
from kdcli.errors import ConfigError
from kdcli.ops.draws import draw
from kdcli.store.signals_bits import pack, packed_size, unpack
from kdcli.store.signals_codec import Codec, Decoded, SampledCodec, TopKCodec, codec_of

V = 300


@pytest.fixture
def logits() -> Tensor:
    return 3 * torch.randn(40, V, generator=torch.Generator().manual_seed(0))


def back(codec: Codec, logits: Tensor, kept: np.ndarray | None = None) -> Decoded:
    """Through bytes; the targets are ids 0, 1, …"""
    targets, key = torch.arange(len(logits)), torch.arange(len(logits)) * 7919
    block = np.frombuffer(codec.block(codec.observe(logits, targets, key)), np.uint8)
    return codec.decode([block], [np.ones(len(logits), bool) if kept is None else kept])


@given(bits=st.integers(0, 32), rows=st.integers(0, 4), count=st.integers(1, 20), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_packed_numbers_come_back(bits: int, rows: int, count: int, seed: int) -> None:
    numbers = np.random.default_rng(seed).integers(0, 2**bits, (rows, count), dtype=np.uint64).astype(np.uint32)
    packed = pack(numbers, bits)
    assert packed.shape == (rows, packed_size(count, bits))
    assert packed_size(count, bits) <= bits * count / 8 + 6  # at most a byte of each plane is not full
    assert (unpack(packed, count, bits).view(np.uint32) == numbers).all()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("bits", [8, 16, 32])
def test_top_k_comes_back_within_its_bound(logits: Tensor, bits, temperature: float) -> None:
    """The ids are those of torch.topk; the mass is kept beside them, exactly, and so is the target's log-probability,
    which is at temperature 1."""
    codec = TopKCodec(k=20, bits=bits, vocab_size=V, temperature=temperature)
    log_p = torch.log_softmax(logits / temperature, -1)
    found, (true, ids) = back(codec, logits), log_p.topk(20)
    assert (found.ids == ids.numpy()).all()
    error = np.abs(found.logprobs - true.numpy()).max(1)
    reach = (true[:, 0] - true[:, -1]).numpy()
    assert all(e <= codec.bound(r) + 1e-5 for e, r in zip(error, reach, strict=True))
    assert bits == 32 or error.max() > 1e-6  # the bound is not that of nothing
    np.testing.assert_allclose(np.exp(found.logprobs).sum(1), true.exp().sum(1), rtol=1e-5)
    assert found.rest is not None
    np.testing.assert_allclose(np.exp(found.rest), 1 - true.double().exp().sum(1), rtol=1e-3, atol=1e-6)
    expected = torch.log_softmax(logits, -1)[range(40), range(40)]
    np.testing.assert_allclose(found.target, expected, rtol=1e-5)


@pytest.mark.parametrize("vocab", [V, 128, 300 * 64 + 17])
@pytest.mark.parametrize("k", [1, 3])
def test_the_likeliest_ids_of_a_large_vocabulary_are_torchs(vocab: int, k: int) -> None:
    logits = torch.randn(5, vocab, generator=torch.Generator().manual_seed(1))
    logits[0, -1] = 9.0  # the largest lies behind the last whole block
    found = back(TopKCodec(k=k, bits=32, vocab_size=vocab), logits)
    assert (found.ids == logits.topk(k).indices.numpy()).all()


@pytest.mark.parametrize("bits", [8, 16])
def test_quantising_keeps_the_order(logits: Tensor, bits) -> None:
    found = back(TopKCodec(k=V, bits=bits, vocab_size=V), logits)
    assert (np.diff(found.logprobs, axis=1) <= 0).all()


def test_the_likeliest_entries_are_kept_most_finely(logits: Tensor) -> None:
    """An error of sqrt(g R) / M + R / 4 M^2 where the gap is g, and what makes the mass right is no more."""
    codec = TopKCodec(k=V, bits=8, vocab_size=V)
    true = torch.log_softmax(logits, -1).sort(-1, descending=True).values
    error = np.abs(back(codec, logits).logprobs - true.numpy())
    gap, reach = (true[:, :1] - true).numpy(), (true[:, :1] - true[:, -1:]).numpy()
    bound = np.sqrt(gap * reach) / 254 + reach / (4 * 254**2)
    weighted = (true.exp().numpy() * bound).sum(1, keepdims=True)  # how far the constant may move all of them
    assert (error <= bound + 1.1 * weighted + 1e-5).all()


def test_all_of_the_vocabulary_has_no_rest(logits: Tensor) -> None:
    codec = TopKCodec(k=None, bits=32, vocab_size=V)
    found = back(codec, logits)
    assert codec.k == V and np.exp(found.rest).max() == 0
    dense = torch.zeros_like(logits).scatter_(-1, torch.from_numpy(found.ids), torch.from_numpy(found.logprobs))
    torch.testing.assert_close(dense, torch.log_softmax(logits, -1))


@pytest.mark.parametrize("bits", [8, 16, 32])
def test_an_id_that_the_teacher_never_says_stands_for_none(logits: Tensor, bits) -> None:
    logits[:, 5:] = -math.inf
    found = back(TopKCodec(k=8, bits=bits, vocab_size=V), logits)
    assert (np.isfinite(found.logprobs).sum(1) == 5).all()
    np.testing.assert_allclose(np.exp(found.logprobs).sum(1), 1, rtol=1e-5)


def test_a_teacher_of_top_k_is_kept_as_it_is(logits: Tensor) -> None:
    codec = TopKCodec(k=6, bits=32, vocab_size=V)
    logprobs, ids = torch.log_softmax(logits, -1).topk(9)
    order = torch.randperm(9)
    given = TopK(ids=ids[:, order], logprobs=logprobs[:, order])
    observed = codec.observe_topk(given, torch.zeros(40))
    found = codec.decode([np.frombuffer(codec.block(observed), np.uint8)], [np.ones(40, bool)])
    assert (found.ids == ids[:, :6].numpy()).all()
    for wrong in (TopK(ids=ids[:, :5], logprobs=logprobs[:, :5]), TopK(ids=ids, logprobs=logprobs, temperature=2.0)):
        with pytest.raises(ConfigError, match=r"set cache\.k and cache\.temperature"):
            codec.observe_topk(wrong, torch.zeros(40))
    with pytest.raises(ConfigError, match="needs a teacher with logits"):
        SampledCodec(samples=5, seed=0, vocab_size=V).observe_topk(given, torch.zeros(40))


@pytest.mark.parametrize("samples", [1, 7, 50, 300])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_drawn_ids_come_back_with_how_often_they_were_drawn(logits: Tensor, samples: int, temperature: float) -> None:
    codec = SampledCodec(samples=samples, seed=0, vocab_size=V, temperature=temperature)
    found = back(codec, logits)
    ids = draw(torch.log_softmax(logits / temperature, -1), torch.arange(40) * 7919, samples).numpy()
    for row in range(40):
        there = np.isfinite(found.logprobs[row])
        expected, counts = np.unique(ids[row], return_counts=True)
        assert (found.ids[row][there] == expected).all()
        np.testing.assert_allclose(np.exp(found.logprobs[row][there]), counts / samples, rtol=1e-5)


def test_drawn_ids_are_the_teacher_in_the_mean(logits: Tensor) -> None:
    """Over many keys of one target: each id as often as it is likely, within five deviations and three draws."""
    codec, keys = SampledCodec(samples=20, seed=0, vocab_size=V), torch.arange(3000) * 104729
    many = logits[:1].expand(3000, -1)
    block = np.frombuffer(codec.block(codec.observe(many, torch.zeros(3000, dtype=torch.int64), keys)), np.uint8)
    found = codec.decode([block], [np.ones(3000, bool)])
    mean = np.bincount(found.ids.ravel(), np.exp(found.logprobs).ravel(), minlength=V) / 3000
    p = torch.softmax(logits[0], -1).numpy()
    assert (np.abs(mean - p) <= 5 * np.sqrt(p * (1 - p) / (20 * 3000)) + 3 / (20 * 3000)).all()


@pytest.mark.parametrize("codec", [TopKCodec(k=9, bits=8, vocab_size=V), SampledCodec(samples=9, seed=0, vocab_size=V)])
def test_some_targets_of_several_blocks_are_read_as_if_alone(logits: Tensor, codec: Codec) -> None:
    targets, key = torch.arange(40), torch.arange(40)
    one, two = (
        np.frombuffer(codec.block(codec.observe(logits[part], targets[part], key[part])), np.uint8)
        for part in (slice(0, 15), slice(15, 40))
    )
    kept = np.arange(40) % 3 == 1
    found = codec.decode([one, two], [kept[:15], kept[15:]])
    assert len(found.target) == kept.sum()
    whole = codec.decode([one, two], [np.ones(15, bool), np.ones(25, bool)])
    for name in ("logprobs", "target"):
        chosen, all_of = getattr(found, name), getattr(whole, name)[kept]
        np.testing.assert_array_equal(chosen, all_of[..., : chosen.shape[-1]] if chosen.ndim == 2 else all_of)
    assert codec.decode([], []).target.shape == (0,)


def test_a_manifest_brings_the_codec_back() -> None:
    for codec in (
        TopKCodec(k=9, bits=16, vocab_size=V, temperature=2.0),
        SampledCodec(samples=3, seed=4, vocab_size=V),
    ):
        again = codec_of(codec.settings, codec.temperature)
        assert type(again) is type(codec) and again.settings == codec.settings


def test_sizes_of_a_large_vocabulary() -> None:
    """18 bits an id: 64 of them with 8 bits each, and four numbers, are 224 bytes."""
    assert TopKCodec(k=64, bits=8, vocab_size=151_936).width == 64 * (18 + 8) // 8 + 16


@pytest.mark.parametrize(
    ("kind", "wrong", "message"),
    [
        (TopKCodec, {"k": 0, "bits": 8}, "keep at least 1 id"),
        (TopKCodec, {"k": 5, "bits": 12}, "8, 16 or 32"),
        (TopKCodec, {"k": 5, "bits": 8, "temperature": 0.0}, "above 0"),
        (SampledCodec, {"samples": 0, "seed": 0}, "at least 1 id"),
    ],
)
def test_settings_without_sense_are_refused(kind, wrong: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        kind(vocab_size=V, **wrong)
