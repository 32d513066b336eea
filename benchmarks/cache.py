"""What a cached teacher costs and keeps: step, reader, bytes, error, capture, and a store of 10^8 targets.

    python -m benchmarks.cache [--rounds 5] [--json FILE]

SmolLM2-135M-Instruct teaches 10 of its 30 layers, in float32, on one thread, on rows of 256 tokens of
recipes://data/mini. What is compared is run in turns and told as a ratio of medians of CPU seconds; FLOPs and bytes are
exact. The reader decodes memory-mapped shards that are in the disk's cache. The large store has K = 8, and its shards
are files with holes, written for some sequences only. `held` is what the process itself takes; pages of mapped files
belong to the disk's cache. Exits 1 where kdcli misses a bar.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from benchmarks.bars import Bar, finish
from benchmarks.models import Pair, smollm
from benchmarks.probes import CPU, exact, seconds
from kdcli.api import Batch, Need
from kdcli.data.jsonl import Jsonl
from kdcli.objective.cross_entropy import CrossEntropy
from kdcli.objective.forward_kl import ForwardKL
from kdcli.store import signals
from kdcli.store.signals_capture import capture
from kdcli.store.signals_codec import Codec, SampledCodec, TopKCodec
from kdcli.store.signals_file import to_bytes
from kdcli.store.signals_keys import KEY
from kdcli.store.signals_shard import FOLDER, ShardWriter
from kdcli.store.signals_stats import error_of, stats_of
from kdcli.teacher.cached import CachedTeacher
from kdcli.teacher.none import NoTeacher
from kdcli.text.collate import collate
from kdcli.text.tokenize import encode
from kdcli.train.distiller import Distiller

LENGTH, ROWS = 256, 2  # tokens of a row, rows of a batch
BATCHES = 4
LARGE = 10**8  # targets
QWEN = 151_936  # ids of a large vocabulary
Result = dict[str, Any]


def texts(tokenizer: Any) -> list[Batch]:
    """Batches of real text, all rows of one length."""
    found, _ = encode(Jsonl(path="recipes://data/mini/valid"), tokenizer, max_length=LENGTH)
    rows = [row for part in found.values() for row in part if len(row) == LENGTH]
    random.Random(0).shuffle(rows)
    return [collate(rows[start : start + ROWS], pad_id=0) for start in range(0, BATCHES * ROWS, ROWS)]


def write(path: Path, pair: Pair, codec: Codec, batches: list[Batch]) -> Path:
    """A store of what the teacher says of the batches."""
    known = signals.Identity(
        teacher="", dtype="float32", tokenizer="", template="", temperature=1.0, codec=codec.settings
    )
    signals.create(path, known, pair.teacher.tokenizer, {})
    writer = ShardWriter(path, size=2**26)
    for batch in batches:
        for entry in capture(pair.teacher, batch, codec):
            writer.add(entry.sequence.key, entry.sequence.wanted, entry.block, entry.sequence.ids)
    writer.flush()
    signals.write_index(path)
    return path


def in_turns(steps: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median CPU seconds of each, every round in another order, after one that warms up."""
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 1):
        for name in random.sample(list(steps), len(steps)):
            spent = seconds(steps[name])
            if turn:
                taken[name].append(spent)
    return {name: statistics.median(values) for name, values in taken.items()}


def step(pair: Pair, store: Path, batch: Batch, rounds: int) -> Result:
    """Forward, loss and backward of the same student: from a cache of 64 ids, and of plain fine-tuning."""
    cached = CachedTeacher(path=str(store))

    def one(teacher: Any, objective: Any) -> Callable[[], None]:
        distiller = Distiller(pair.student, teacher, {"kd": objective})

        def run() -> None:
            pair.student.zero_grad(set_to_none=True)
            distiller(batch, distiller.count(batch))[0].backward()

        return run

    steps = {"cached": one(cached, ForwardKL()), "sft": one(NoTeacher(), CrossEntropy())}
    flops = {name: exact(run).flops for name, run in steps.items()}
    taken = in_turns(steps, rounds)
    return {
        "seconds": taken,
        "time_ratio": taken["cached"] / taken["sft"],
        "flops_ratio": flops["cached"] / flops["sft"],
        "annotate_share": seconds(lambda: cached.annotate(batch, Need.DISTRIBUTION)) / taken["sft"],
    }


def captured(pair: Pair, batch: Batch, codec: Codec, rounds: int) -> Result:
    """How much of the teacher's bare forward speed is left when its signal is coded too."""
    steps = {"capture": lambda: capture(pair.teacher, batch, codec), "bare": lambda: pair.teacher_logits(batch)}
    taken = in_turns(steps, rounds)
    return {"seconds": taken, "speed": taken["bare"] / taken["capture"]}


def kept(pair: Pair, store: Path) -> Result:
    """Bytes of a target, and how far what is stored is from the teacher."""
    one = signals.Signals(store)
    stats, error = stats_of(one), error_of(one, pair.teacher, CPU)
    assert error is not None, "token ids are kept"
    data = sum(shard.file["data"].nbytes for shard in one.shards)  # without the keys, and the sampled token ids
    return {
        "bytes": data / stats.targets,
        "entries": stats.entries,
        "dropped": stats.dropped,
        "kl": asdict(error),
    }


def reader(folder: Path, codec: TopKCodec | SampledCodec) -> Result:
    """Targets that a core decodes in a second, of batches of 32 sequences of 512."""
    generator = np.random.default_rng(0)
    signals.create(folder, _identity(codec), _NoTokenizer(), {})
    writer = ShardWriter(folder, size=2**25)
    logits = torch.from_numpy(_zipf(64, codec.vocab_size, generator))
    observed = codec.observe(logits, torch.zeros(64, dtype=torch.int64), torch.arange(64) * 7919)
    for _ in range(256):
        order = generator.integers(0, 64, 512)
        block = codec.block(tuple(column[order] for column in observed))
        high, low = (int(number) for number in generator.integers(0, 2**63, 2))
        writer.add((high, low), np.ones(512, bool), block, None)
    writer.flush()
    store = signals.Signals(folder)
    wanted = [np.ones(512, bool)] * 32
    everything = [generator.permutation(len(store))[:32] for _ in range(16)]
    size = sum(shard.file["data"].nbytes for shard in store.shards) / (512 * len(store))
    for entries in everything:
        store.read(entries, wanted)  # verifies the checksums, and warms up
    taken = [seconds(lambda e=e: store.read(e, wanted)) for e in everything]
    return {"targets_per_second": 512 * 32 / statistics.median(taken), "bytes": size}


def _zipf(rows: int, vocab: int, generator: np.random.Generator) -> np.ndarray:
    """Logits whose probabilities fall with the rank to the power of 1.6, each row in another order."""
    falling = -1.6 * np.log(np.arange(1, vocab + 1))
    return np.stack([falling[generator.permutation(vocab)] for _ in range(rows)]).astype(np.float32)


class _NoTokenizer:
    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir()


def _identity(codec: Codec) -> signals.Identity:
    facts = {"teacher": "", "dtype": "", "tokenizer": "", "template": ""}
    return signals.Identity(**facts, temperature=codec.temperature, codec=codec.settings)


def large(folder: Path, targets: int) -> Result:
    """Open a store of many targets, find sequences all over it, read some."""
    codec = TopKCodec(k=8, bits=8, vocab_size=2**16)
    length, each = 512, 4096  # targets of a sequence, sequences of a shard
    signals.create(folder, _identity(codec), _NoTokenizer(), {})
    generator, readable = np.random.default_rng(0), []
    for start in range(0, targets, each * length):
        sequences = min(each, -(-(targets - start) // length))
        readable.append(_shard_with_holes(folder, codec, length, sequences, generator))
    signals.write_index(folder)
    keys = np.concatenate(readable)
    before = _resident()
    began = time.perf_counter()
    store = signals.Signals(folder)
    first = store.find(keys[:1])
    opened = time.perf_counter() - began
    held = [_resident() - before]
    assert (first >= 0).all(), "the first sequence is there"
    half = len(keys) // 2
    for part in (generator.permutation(keys[:half]), generator.permutation(keys[half:])):
        entries = store.find(part)
        assert (entries >= 0).all(), "every sequence is there"
        for entry in entries:
            assert len(store.read([int(entry)], [np.ones(length, bool)]).target) == length
        held.append(_resident() - before)
    return {
        "targets": targets,
        "shards": len(store.shards),
        "open_seconds": opened,
        "held_mib": held[-1],
        "held_mib_second_half": held[-1] - held[-2],
    }


def _shard_with_holes(
    folder: Path, codec: TopKCodec, length: int, sequences: int, generator: np.random.Generator
) -> np.ndarray:
    """A shard of which eight sequences can be read; returns their keys."""
    size = length // 8 + length * codec.width
    keys = generator.integers(0, 2**63, (sequences, 2)).astype("<u8")
    arrays = {
        "key": keys,
        "offset": np.arange(sequences + 1, dtype="<u8") * size,
        "length": np.full(sequences, length, "<u4"),
        "count": np.full(sequences, length, "<u4"),
        "sample_length": np.zeros(0, "<u4"),
        "sample_ids": np.zeros(0, "<i4"),
    }
    facts = {"sequences": str(sequences), "targets": str(sequences * length), "format": "kdcli signals 1"}
    empty = to_bytes(arrays | {"data": np.broadcast_to(np.zeros(1, np.uint8), size * sequences)}, facts)
    begin = len(empty) - size * sequences
    chosen = generator.permutation(sequences)[:8]
    file = folder / "unnamed"
    with open(file, "wb") as out:
        out.write(empty[:begin])
        out.truncate(len(empty))
        for number in chosen:
            out.seek(begin + int(number) * size)
            out.write(b"\xff" * (length // 8))
    file.rename(folder / FOLDER / f"{_hash(file)}.safetensors")
    return keys[chosen].view(KEY)[:, 0]


def _hash(file: Path) -> str:
    digest = xxhash.xxh3_128()
    with open(file, "rb") as content:
        while block := content.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def _resident() -> float:
    """MiB that the process itself holds."""
    return int(re.findall(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[0]) / 1024


def bars(found: Result) -> list[Bar]:
    """Every promise."""
    step, large, wide = found["step"], found["large"], [one["bytes"] for one in found["reader"].values()]
    promised = [
        ("cached step over SFT step, CPU time", step["time_ratio"], 1.15, 1.05),
        ("cached step over SFT step, FLOPs", step["flops_ratio"], 1.01, None),
        ("bytes of a target, top-64 of 151,936 ids", wide[0], 260, None),
        ("bytes of a target, 50 draws of 151,936 ids", wide[1], 60, None),
        ("bytes of a target, top-64, SmolLM2 on text", found["kept"]["top-64"]["bytes"], 260, None),
        ("bytes of a target, 50 draws, SmolLM2 on text", found["kept"]["sampled"]["bytes"], 60, None),
        ("KL error of top-64 in 8 bits, nats", found["kept"]["top-64"]["kl"]["mean"], 1e-3, None),
        (f"seconds to open {large['targets']:.0e} targets", large["open_seconds"], 1, None),
        ("MiB held after reading all over it", large["held_mib"], 64, None),
        ("MiB that the second half of the reads took", large["held_mib_second_half"], 8, None),
    ]
    for name, one in found["reader"].items():
        promised.append(
            (f"10^6 over targets a core reads in a second, {name}", 1e6 / one["targets_per_second"], 1, None)
        )
    for name, one in found["capture"].items():
        promised.append((f"teacher's bare speed over capture's, {name}", 1 / one["speed"], 1 / 0.9, None))
    return [Bar(claim=claim, measured=value, at_most=most, aim=aim) for claim, value, most, aim in promised]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--targets", type=int, default=LARGE, help="of the large store")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    random.seed(0)
    folder = Path(tempfile.mkdtemp())
    try:
        found: Result = {"large": large(folder / "large", options.targets)}
        shutil.rmtree(folder / "large")
        found["reader"] = {
            "top-64": reader(folder / "r1", TopKCodec(k=64, bits=8, vocab_size=QWEN)),
            "sampled": reader(folder / "r2", SampledCodec(samples=50, seed=0, vocab_size=QWEN)),
        }
        pair = smollm(CPU, "float32")
        assert pair.teacher_head is not None, "loaded"
        size, batches = pair.teacher_head.vocab_size, texts(pair.teacher.load_tokenizer())
        codecs: dict[str, Codec] = {
            "top-64": TopKCodec(k=64, bits=8, vocab_size=size),
            "sampled": SampledCodec(samples=50, seed=0, vocab_size=size),
        }
        stores = {name: write(folder / name, pair, codec, batches) for name, codec in codecs.items()}
        found["kept"] = {name: kept(pair, store) for name, store in stores.items()}
        found["capture"] = {name: captured(pair, batches[0], one, options.rounds) for name, one in codecs.items()}
        found["step"] = step(pair, stores["top-64"], batches[0], options.rounds)
    finally:
        shutil.rmtree(folder)
    print(json.dumps(found, indent=1))
    checked = bars(found)
    return finish(found, checked, options.json)


if __name__ == "__main__":
    sys.exit(main())
