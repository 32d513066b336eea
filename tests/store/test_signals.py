"""A store of signals finds a sequence by its content, and never reads what is not as it was written."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kdcli.api import Batch
from kdcli.errors import ConfigError
from kdcli.store import signals
from kdcli.store.signals import Identity, Signals
from kdcli.store.signals_codec import SampledCodec, TopKCodec
from kdcli.store.signals_keys import as_keys, key_of, key_of_segment, sequences_of, wanted_of_segment
from kdcli.store.signals_shard import ShardWriter
from kdcli.store.tokens import Row, Segment, TeacherTokens
from kdcli.text.collate import collate
from tests import caches

CODEC = TopKCodec(k=8, bits=8, vocab_size=100)


def segment(seed: int, length: int = 9, begin: int = 2, teacher: np.ndarray | None = None) -> Segment:
    ids = np.random.default_rng(seed).integers(1, 90, length).astype(np.int32)
    mask = np.arange(length) >= begin
    own = None
    if teacher is not None:
        answer = np.arange(length - begin, dtype=np.int32)
        own = TeacherTokens(
            ids=np.concatenate([teacher, ids[begin:]]),
            span=np.concatenate([np.full(begin, -1, np.int32), answer]),
            teacher_span=np.concatenate([np.full(len(teacher), -1, np.int32), answer]),
        )
    return Segment(ids=ids, mask=mask, key=f"row{seed}", teacher=own)


def batch_of(*rows: tuple[Segment, ...] | Segment) -> Batch:
    return collate([Row(row if isinstance(row, tuple) else (row,)) for row in rows], pad_id=0)


class Source:
    """Writes made-up signals: of a sequence what its key says."""

    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "shards").mkdir(parents=True)
        facts = {"teacher": "t", "dtype": "", "tokenizer": "k", "template": "", "temperature": 1.0}
        signals.atomic.write_json(path / "manifest.json", {"format": 1, **facts, "codec": CODEC.settings})

    def write(self, *segments: Segment, size: int = 2**20, wanted: np.ndarray | None = None) -> None:
        writer = ShardWriter(self.path, size=size)
        for one in segments:
            key, own = key_of_segment(one), wanted_of_segment(one) if wanted is None else wanted
            writer.add(key, own, CODEC.block((self.rows(key, own),)), one.ids)
        writer.flush()

    def rows(self, key: tuple[int, int], wanted: np.ndarray) -> np.ndarray:
        """A target's log-probability is its position, and the rest depends on the key."""
        places = np.flatnonzero(wanted).astype(np.float32)
        ids = np.tile((np.arange(8) + key[1] % 90)[None], (len(places), 1))
        logprobs = np.tile(np.log(np.arange(8, 0, -1) / 64)[None].astype(np.float32), (len(places), 1))
        return CODEC.rows(ids, logprobs, np.full(len(places), np.log(28 / 64), np.float32), places)


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return Source(tmp_path / "store")


def test_a_sequence_is_found_in_any_order_batch_and_packed_row(source: Source) -> None:
    own = [segment(seed, length=5 + seed) for seed in range(6)]
    source.write(*own, size=600)  # several shards
    store = Signals(source.path)
    assert len(store.shards) > 1 and len(store) == 6
    for batch in (batch_of(*own), batch_of(*own[::-1]), batch_of((own[3], own[1]), (own[5], own[0], own[2]))):
        sequences = sequences_of(batch)
        entries = store.find(as_keys([one.key for one in sequences]))
        assert (entries >= 0).all()
        found = store.read(entries, [one.wanted for one in sequences])
        expected = [(one.key[1] % 90, place) for one in sequences for place in np.flatnonzero(one.wanted)]
        assert [(int(ids[0]), int(target)) for ids, target in zip(found.ids, found.target, strict=True)] == expected
        mask = batch.mask.numpy()
        assert [place for _, place in expected] == [
            int(t - one.start) for one in sequences for t in np.flatnonzero(mask[one.line]) if _inside(one, t)
        ]


def _inside(one, column: int) -> bool:
    return one.start <= column < one.start + len(one.ids)


def test_keys_of_segments_are_those_of_their_batches() -> None:
    prompt = np.array([7, 8, 9, 10], np.int32)
    for rows in ([segment(1)], [segment(1), segment(2, teacher=prompt)], [segment(3, teacher=prompt[:1])]):
        sequences = sequences_of(batch_of(*rows))
        assert [one.key for one in sequences] == [key_of_segment(row) for row in rows]
        for one, row in zip(sequences, rows, strict=True):
            assert (one.wanted == wanted_of_segment(row)).all()
        packed = sequences_of(batch_of(tuple(rows)))
        assert [one.key for one in packed] == [key_of_segment(row) for row in rows]


def test_another_prompt_of_the_teacher_is_another_sequence() -> None:
    plain, one, other = segment(1), segment(1, teacher=np.array([5], np.int32)), segment(1, teacher=np.array([6, 5]))
    assert len({key_of_segment(row) for row in (plain, one, other)}) == 3
    ids = np.arange(5)
    assert key_of(ids) == key_of(ids, ids.copy())


def test_a_last_target_outside_of_the_row_is_part_of_the_key() -> None:
    """Rows cut by hand may be supervised to their end; the collated row has one token more."""
    whole = batch_of(segment(1))
    names = ("input_ids", "targets", "mask", "attention_mask", "segment")
    cut = replace(whole, **{name: getattr(whole, name)[:, :-1] for name in names})
    assert sequences_of(cut)[0].key == sequences_of(whole)[0].key


def test_fewer_targets_hit_and_more_miss(source: Source) -> None:
    source.write(segment(1, begin=4))
    store = Signals(source.path)
    (entry,) = store.find(as_keys([key_of_segment(segment(1))]))
    assert store.covered(int(entry), wanted_of_segment(segment(1, begin=4)))
    assert store.covered(int(entry), wanted_of_segment(segment(1, begin=6)))
    assert not store.covered(int(entry), wanted_of_segment(segment(1, begin=3)))
    fewer = wanted_of_segment(segment(1, begin=6))
    assert (store.read([entry], [fewer]).target == np.flatnonzero(fewer)).all()


def test_the_entry_with_more_targets_wins(source: Source) -> None:
    source.write(segment(1, begin=4))
    source.write(segment(1, begin=2))
    source.write(segment(1, begin=5))
    store = Signals(source.path)
    (entry,) = store.find(as_keys([key_of_segment(segment(1))]))
    assert len(store) == 1 and store.covered(int(entry), wanted_of_segment(segment(1, begin=2)))


def test_an_index_that_does_not_fit_the_shards_is_not_used(source: Source) -> None:
    source.write(segment(1))
    signals.write_index(source.path)
    assert len(Signals(source.path)) == 1
    source.write(segment(2))
    store = Signals(source.path)
    assert (store.find(as_keys([key_of_segment(segment(n)) for n in (1, 2, 3)])) >= 0).tolist() == [True, True, False]
    signals.write_index(source.path)
    file = source.path / "index.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 255
    file.write_bytes(content)
    assert len(Signals(source.path)) == 2  # made again from the shards


def test_an_empty_store_finds_nothing(source: Source) -> None:
    store = Signals(source.path)
    assert len(store) == 0
    assert store.find(as_keys([(1, 2)])).tolist() == [-1]


def read(path: Path, one: Segment) -> None:
    store = Signals(path)
    store.block(int(store.find(as_keys([key_of_segment(one)]))[0]))


def _truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 5)


def _empty(file: Path) -> None:
    os.truncate(file, 3)


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "told"), [(_truncate, r"has [\d,]+ of [\d,]+ bytes"), (_empty, "header"), (_flip, "checksum differs")]
)
def test_a_damaged_shard_is_named_and_never_read(source: Source, harm, told: str) -> None:
    source.write(segment(1))
    signals.write_index(source.path)
    source.write(segment(2))
    (name,) = {
        one.path.name for one in Signals(source.path).shards if one.keys()[0] == as_keys([key_of_segment(segment(2))])
    }
    harm(source.path / "shards" / name)
    with pytest.raises(ConfigError, match=rf"shard {name} .*{told}.*; run the same `kdcli cache` again"):
        read(source.path, segment(2))
    assert len(signals.damage(source.path)) == 1
    assert len(signals.mend(source.path, signals.shard_names(source.path))) == 1
    assert Signals(source.path).find(as_keys([key_of_segment(segment(n)) for n in (1, 2)])).tolist() == [0, -1]


def test_a_folder_that_is_no_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no cache of a teacher here .*make one: kdcli cache"):
        Signals(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": 99}')
    with pytest.raises(ConfigError, match="another version"):
        Signals(tmp_path)


def test_what_differs_between_two_stores_is_named() -> None:
    codec = TopKCodec(k=8, bits=8, vocab_size=100)
    one = caches.identity(codec)
    changes = {"teacher": "x", "tokenizer": "x", "template": "x", "temperature": 2.0, "dtype": "bfloat16"}
    words = {
        "template": "chat template",
        "temperature": r"temperature (1.0, not 2.0)",
        "dtype": "(float32, not bfloat16)",
    }
    for name, value in changes.items():
        (told,) = one.unlike(replace(one, **{name: value}))
        assert words.get(name, name) in told
    (told,) = one.unlike(replace(one, codec=SampledCodec(samples=5, seed=0, vocab_size=100).settings))
    assert "topk k=8 bits=8" in told and "sampled samples=5" in told
    assert one.unlike(Identity(**vars(one))) == []


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A store of 32,000 sequences, all of one content, in 16 shards."""
    source = Source(tmp_path / "large")
    writer = ShardWriter(source.path, size=2**30)
    wanted = np.ones(16, bool)
    block = CODEC.block((source.rows((0, 0), wanted),))
    generator = np.random.default_rng(0)
    for _ in range(16):
        for high, low in generator.integers(0, 2**63, (2000, 2)):
            writer.add((int(high), int(low)), wanted, block, None)
        writer.flush()
    signals.write_index(source.path)
    return source.path


def test_opening_reads_no_signal(large: Path) -> None:
    began = time.process_time()
    store = Signals(large)
    assert store.find(as_keys([(1, 2)])).tolist() == [-1]
    assert time.process_time() - began < 0.5  # benchmarks/cache.py measures 10^8 tokens
    assert all(shard._offset is None for shard in store.shards)


def test_tensors_on_the_batchs_device_are_read_too() -> None:
    batch = batch_of(segment(1))
    assert sequences_of(batch.to(torch.device("cpu")))[0].number == 0
