"""A cached teacher says what the teacher said: the same losses and gradients, from any batch of the sequences."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from kdcli.api import Batch, Need, Objective
from kdcli.errors import ConfigError
from kdcli.objective.forward_kl import ForwardKL
from kdcli.objective.generalized_jsd import GeneralizedJSD
from kdcli.objective.reverse_kl import ReverseKL
from kdcli.objective.sampled import Sampled
from kdcli.store.signals import Signals
from kdcli.store.signals_codec import SampledCodec, TopKCodec
from kdcli.store.signals_stats import coverage, error_of, stats_of
from kdcli.store.tokens import Row, Segment, TeacherTokens
from kdcli.teacher.cached import CachedTeacher
from kdcli.teacher.hf import HFTeacher
from kdcli.text.collate import collate
from kdcli.train.distiller import Distiller
from tests import caches
from tests.caches import IDS, cached, store_of
from tests.toys import ToyStudent, llama


def segment(seed: int, length: int = 11, begin: int = 3) -> Segment:
    ids = np.random.default_rng(seed).integers(1, 4000, length).astype(np.int32)
    return Segment(ids=ids, mask=np.arange(length) >= begin, key=f"row{seed}")


def of(*segments: Segment, packed: bool = False) -> Batch:
    rows = [Row(segments)] if packed else [Row((one,)) for one in segments]
    return collate(rows, pad_id=0)


SEGMENTS = [segment(seed, length=6 + seed) for seed in range(4)]


@pytest.fixture(scope="module")
def teacher() -> HFTeacher:
    return caches.teacher()


@pytest.fixture(scope="module")
def full(teacher: HFTeacher, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of the vocabulary, exactly."""
    path = tmp_path_factory.mktemp("cache") / "full"
    return store_of(path, teacher, TopKCodec(k=None, bits=32, vocab_size=IDS), of(*SEGMENTS))


@pytest.fixture(scope="module")
def top(teacher: HFTeacher, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cache") / "top"
    return store_of(path, teacher, TopKCodec(k=64, bits=8, vocab_size=IDS), of(*SEGMENTS))


def step(teacher, objective: Objective, batch: Batch) -> tuple[float, list[Tensor]]:
    """Loss and gradients of one student."""
    student = ToyStudent(llama(7, vocab=IDS))
    distiller = Distiller(student, teacher, {"kd": objective})
    loss, _ = distiller(batch, distiller.count(batch))
    loss.backward()
    return float(loss.detach()), [p.grad for p in student.parameters() if p.grad is not None]


def apart(one: list[Tensor], other: list[Tensor]) -> float:
    """Relative distance of two gradients."""
    difference = math.sqrt(sum(float((a - b).square().sum()) for a, b in zip(one, other, strict=True)))
    return difference / math.sqrt(sum(float(a.square().sum()) for a in one))


@pytest.mark.parametrize("objective", [ForwardKL(), ReverseKL(), GeneralizedJSD()], ids=lambda o: type(o).__name__)
def test_all_of_the_vocabulary_is_the_teacher(teacher: HFTeacher, full: Path, objective: Objective) -> None:
    """In another order, and packed: within float32's rounding."""
    for batch in (of(*SEGMENTS), of(SEGMENTS[2], SEGMENTS[0]), of(*SEGMENTS[::-1], packed=True)):
        online, cache = (step(one, objective, batch) for one in (teacher, cached(full)))
        assert cache[0] == pytest.approx(online[0], rel=1e-5)
        assert apart(online[1], cache[1]) < 1e-5


@pytest.mark.parametrize("bits", [8, 16])
def test_quantising_moves_loss_and_gradient_by_what_it_says(teacher: HFTeacher, tmp_path: Path, bits) -> None:
    """|d KL(p || q)| = |sum (p' - p) log p / q + p' (log p' - log p)|, and |p' - p| <= p (e^bound - 1), where the
    bound is that of the largest gap here, below 30 nats."""
    codec = TopKCodec(k=None, bits=bits, vocab_size=IDS)
    path, batch = store_of(tmp_path / "store", teacher, codec, of(*SEGMENTS)), of(*SEGMENTS)
    online, cache = (step(one, ForwardKL(), batch) for one in (teacher, cached(path)))
    assert abs(cache[0] - online[0]) <= codec.bound(30) * (1 + online[0])
    assert apart(online[1], cache[1]) < {8: 0.03, 16: 1e-3}[bits]
    if bits == 8:
        assert cache[0] != online[0]


def test_top_k_bounds_the_loss_from_below(teacher: HFTeacher, top: Path) -> None:
    batch = of(*SEGMENTS)
    online, cache = (step(one, ForwardKL(), batch)[0] for one in (teacher, cached(top)))
    assert 0 < cache < online


def test_drawn_ids_are_those_that_the_online_loss_draws(teacher: HFTeacher, tmp_path: Path) -> None:
    """The keys of the rows, the seed and the tokens are the same, so nothing is left to chance."""
    codec = SampledCodec(samples=20, seed=3, vocab_size=IDS)
    path = store_of(tmp_path / "store", teacher, codec, of(*SEGMENTS))
    for batch in (of(*SEGMENTS), of(*SEGMENTS[::-1], packed=True)):
        online, cache = (step(one, Sampled(samples=20, seed=3), batch) for one in (teacher, cached(path)))
        assert cache[0] == pytest.approx(online[0], rel=1e-5)
        assert apart(online[1], cache[1]) < 1e-4


def test_drawn_ids_have_the_dense_gradient_in_the_mean(teacher: HFTeacher, tmp_path: Path) -> None:
    """Over 12 seeds the error of the mean gradient is about 1 / sqrt(12) of one draw's: it is noise, and no bias."""
    batch = of(SEGMENTS[0])
    dense = step(teacher, ForwardKL(), batch)[1]
    found = []
    for seed in range(12):
        codec = SampledCodec(samples=8, seed=seed, vocab_size=IDS)
        path = store_of(tmp_path / f"{seed}", teacher, codec, batch)
        found.append(step(cached(path), Sampled(), batch)[1])
    single = sum(apart(dense, one) for one in found) / len(found)
    mean = [torch.stack(parts).mean(0) for parts in zip(*found, strict=True)]
    assert apart(dense, mean) < 0.45 * single


def test_the_targets_log_probabilities_are_the_teachers(teacher: HFTeacher, top: Path) -> None:
    batch = of(*SEGMENTS)
    expected = teacher.annotate(batch, Need.LOGPROBS).logprobs
    signal = cached(top).annotate(batch, Need.LOGPROBS)
    assert signal.topk is None
    torch.testing.assert_close(signal.logprobs, expected, rtol=1e-5, atol=1e-5)


def test_positions_without_a_target_stand_for_nothing(top: Path) -> None:
    batch = of(*SEGMENTS)
    topk = cached(top).annotate(batch, Need.DISTRIBUTION).topk
    assert topk is not None and not topk.sampled and topk.ids.shape == (*batch.mask.shape, 64)
    assert torch.isfinite(topk.logprobs[batch.mask]).all()
    assert (topk.logprobs[~batch.mask] == -math.inf).all()


def test_a_batch_without_targets_has_an_empty_signal(top: Path) -> None:
    batch = of(*SEGMENTS)
    batch = replace(batch, mask=torch.zeros_like(batch.mask))
    signal = cached(top).annotate(batch, Need.DISTRIBUTION | Need.LOGPROBS)
    assert signal.topk is not None and (signal.topk.logprobs == -math.inf).all()


def test_another_prompt_of_the_teacher_is_kept_apart(teacher: HFTeacher, tmp_path: Path) -> None:
    """Beside a row without one, padded and packed."""
    one, answer = SEGMENTS[0], np.arange(3, dtype=np.int32)
    other = np.array([17, 18, 19, 20, 21], np.int32)
    teacher_ids = np.concatenate([other, one.ids[3:]])
    tokens = TeacherTokens(
        ids=teacher_ids,
        span=np.concatenate([np.full(3, -1, np.int32), answer]),
        teacher_span=np.concatenate([np.full(5, -1, np.int32), answer]),
    )
    both = [replace(one, teacher=tokens), SEGMENTS[1]]
    path = store_of(tmp_path / "store", teacher, TopKCodec(k=None, bits=32, vocab_size=IDS), of(*both))
    for batch in (of(*both), of(*both, packed=True), of(SEGMENTS[1])):
        online, cache = (step(t, ForwardKL(), batch)[0] for t in (teacher, cached(path)))
        assert cache == pytest.approx(online, rel=1e-5)
    with pytest.raises(ConfigError, match="1 of the 1 rows"):
        step(cached(path), ForwardKL(), of(one))


def test_a_miss_names_the_row_and_the_way_out(top: Path) -> None:
    batch = of(SEGMENTS[0], segment(50), segment(51))
    told = r"2 of the 3 rows .* \(the first is row50, 11 tokens\); write them with `kdcli cache cache.path=.*compute"
    with pytest.raises(ConfigError, match=told):
        cached(top).annotate(batch, Need.DISTRIBUTION)
    wider = replace(SEGMENTS[1], mask=np.arange(7) >= 1)  # more targets than are stored
    with pytest.raises(ConfigError, match="row1"):
        cached(top).annotate(of(wider), Need.DISTRIBUTION)
    narrower = replace(SEGMENTS[1], mask=np.arange(7) >= 5)
    cached(top).annotate(of(narrower), Need.DISTRIBUTION)


def test_what_is_computed_is_what_a_hit_would_say(teacher: HFTeacher, top: Path, tmp_path: Path) -> None:
    new = [segment(50), segment(51)]
    batch = of(SEGMENTS[0], new[0], SEGMENTS[1], new[1])
    own = HFTeacher(path=caches.TINY, dtype="float32")
    found = cached(top, miss="compute", teacher=own).annotate(batch, Need.DISTRIBUTION | Need.LOGPROBS)
    codec = TopKCodec(k=64, bits=8, vocab_size=IDS)
    whole = store_of(tmp_path / "whole", teacher, codec, of(*SEGMENTS), of(*new))
    expected = cached(whole).annotate(batch, Need.DISTRIBUTION | Need.LOGPROBS)
    assert found.topk is not None and expected.topk is not None
    p, q = (dense(one.topk.ids, one.topk.logprobs, batch.mask) for one in (found, expected))
    torch.testing.assert_close(p, q, rtol=0, atol=1e-3)
    torch.testing.assert_close(found.logprobs, expected.logprobs, rtol=1e-5, atol=1e-5)


def dense(ids: Tensor, logprobs: Tensor, mask: Tensor) -> Tensor:
    """Probabilities over the vocabulary: of equal ones the order may differ."""
    return torch.zeros(int(mask.sum()), IDS).scatter_(-1, ids[mask], logprobs[mask].exp())


def test_a_student_with_fewer_ids_sees_what_both_know(teacher: HFTeacher, full: Path) -> None:
    """The vocabulary's last hundred ids are cut, as they are from logits."""
    student = ToyStudent(llama(7, vocab=IDS), vocab_size=IDS - 100)
    batch = of(*SEGMENTS)
    losses = []
    for one in (teacher, cached(full)):
        distiller = Distiller(student, one, {"kd": ForwardKL()})
        losses.append(float(distiller(batch, distiller.count(batch))[0].detach()))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


# ----------------------------------------------------------------------------------------------- bad input


def test_a_store_that_is_not_there_is_refused_when_the_teacher_is_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no cache"):
        CachedTeacher(path=str(tmp_path / "nothing"))


def test_another_nested_teacher_is_refused(top: Path) -> None:
    other = HFTeacher(path=caches.TINY, dtype="bfloat16")
    (told,) = CachedTeacher(path=str(top), miss="compute", teacher=other).problems_with(None, [])
    assert "of dtype float32, not bfloat16" in told
    with pytest.raises(ConfigError, match="needs the teacher itself"):
        CachedTeacher(path=str(top), miss="compute")


def test_objectives_that_the_codec_does_not_serve_are_refused(top: Path, tmp_path: Path, teacher: HFTeacher) -> None:
    (told,) = CachedTeacher(path=str(top)).problems_with(None, [("objective.kd", Sampled())])
    assert told.startswith("objective.kd: Sampled would be biased") and "cache.codec=sampled" in told
    drawn = store_of(tmp_path / "drawn", teacher, SampledCodec(samples=5, seed=0, vocab_size=IDS), of(SEGMENTS[0]))
    (told,) = CachedTeacher(path=str(drawn)).problems_with(None, [("objective.kd", ForwardKL())])
    assert "objective@objective.kd=sampled" in told


# ---------------------------------------------------------------------------------------------------- stats


@pytest.mark.parametrize(
    "codec", [TopKCodec(k=64, bits=8, vocab_size=IDS), SampledCodec(samples=9, seed=0, vocab_size=IDS)]
)
def test_stats_measure_what_is_stored(teacher: HFTeacher, tmp_path: Path, codec) -> None:
    path = store_of(tmp_path / "store", teacher, codec, of(*SEGMENTS))
    store = Signals(path)
    stats, targets = stats_of(store), sum(int(one.mask[1:].sum()) for one in SEGMENTS)
    assert (stats.sequences, stats.targets, stats.looked_at, stats.damaged) == (4, targets, targets, [])
    error = error_of(store, teacher, torch.device("cpu"))
    assert error is not None and error.targets == targets
    if codec.sampled:
        assert stats.dropped is None and 0.1 < error.mean < 9  # the noise of few draws
    else:
        log_p = torch.log_softmax(teacher.head(teacher.annotate(of(*SEGMENTS), Need.DISTRIBUTION).hidden), -1)  # pyright: ignore
        left = 1 - log_p[of(*SEGMENTS).mask].topk(64).values.exp().sum(-1)
        assert stats.dropped == pytest.approx((float(left.mean()), float(left.max())), rel=1e-3)
        assert 0 < error.mean < 1e-3 and error.largest < codec.bound(20)
    assert coverage(store, [*SEGMENTS[:2], segment(50)]) == (2, 3, 3 + 4 - 0, 3 + 4 + 8)
