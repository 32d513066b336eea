"""Stores of the tiny teacher's signal for tests: written by `kdcli cache`'s worker, or by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml

from kdcli.api import Batch
from kdcli.store import paths, signals
from kdcli.store.signals_capture import capture
from kdcli.store.signals_codec import Codec
from kdcli.store.signals_shard import ShardWriter
from kdcli.teacher.cached import CachedTeacher
from kdcli.teacher.hf import HFTeacher
from tests import runs

TINY = "recipes://data/tiny_teacher"
IDS = 4096
NODE = {"_target_": "kdcli.teacher.hf.HFTeacher", "path": TINY, "dtype": "float32"}


def teacher() -> HFTeacher:
    one = HFTeacher(path=TINY, dtype="float32")
    one.load(torch.device("cpu"))
    return one


def identity(codec: Codec, **changes: Any) -> signals.Identity:
    facts = {"teacher": HFTeacher(path=TINY, dtype="float32").fingerprint(), "dtype": "float32"}
    kept = {"temperature": codec.temperature, "codec": codec.settings}
    return signals.Identity(**{**facts, "tokenizer": "t", "template": "", **kept, **changes})


def store_of(path: Path, one: HFTeacher, codec: Codec, *batches: Batch, shard: int = 2**20) -> Path:
    """A store of what `one` says of the batches."""
    signals.create(path, identity(codec), one.load_tokenizer(), {"teacher_config": NODE})
    add(path, one, codec, *batches, shard=shard)
    return path


def add(path: Path, one: HFTeacher, codec: Codec, *batches: Batch, shard: int = 2**20) -> None:
    writer = ShardWriter(path, size=shard)
    for batch in batches:
        for entry in capture(one, batch, codec):
            sequence = entry.sequence
            writer.add(sequence.key, sequence.wanted, entry.block, sequence.ids if entry.alone else None)
    writer.flush()


def cached(path: Path, **settings: Any) -> CachedTeacher:
    one = CachedTeacher(path=str(path), **settings)
    one.load(torch.device("cpu"))
    return one


def write_run(folder: Path, name: str = "cache", **changes: Any) -> Path:
    """`folder/NAME` with the config of a `kdcli cache` into `folder/store`: all of the vocabulary, in 32 bits."""
    runs.write_run(folder)  # the data
    base: dict[str, Any] = {
        "verb": "cache",
        "run": {"name": "tiny", "dir": "", "seed": 1},
        "batch": {"micro_size": 2, "max_length": 32, "overflow": "split"},
        "cache": {
            "path": str(folder / "store"),
            "codec": "topk",
            "k": None,
            "bits": 32,
            "samples": 50,
            "seed": 0,
            "temperature": 1.0,
            "rejected": False,
            "shard_mib": 1,
        },
        "teacher": dict(NODE),
        "student": {"_target_": "kdcli.student.hf.HFStudent", "path": None},
        "data": {"_target_": "kdcli.data.jsonl.Jsonl", "path": str(folder / "data")},
        "report": {},
        "engine": {"_target_": "kdcli.engine.zero.Zero", "stage": 0, "precision": "fp32"},
        "launch": {"_target_": "kdcli.launch.torchrun.Torchrun", "processes": 1},
    }
    for key, value in changes.items():
        section, last = key.split("__")
        base[section][last] = value
    run_dir = folder / name
    run_dir.mkdir()
    base["run"]["dir"] = str(run_dir)
    (run_dir / "config.yaml").write_text(yaml.safe_dump(base))
    return run_dir


def shards(folder: Path) -> dict[str, int]:
    """Name of each shard of `folder/store` -> when it was written."""
    return {one: (folder / "store/shards" / one).stat().st_mtime_ns for one in signals.shard_names(folder / "store")}


def content(store: Path) -> dict[tuple[int, int], bytes]:
    """Everything that is found in a store: key -> block."""
    one = signals.Signals(store)
    high, low, _, _ = one._index
    return {(int(h), int(lo)): one.block(n)[1].tobytes() for n, (h, lo) in enumerate(zip(high, low, strict=True))}


PACKAGED = paths.recipes() / "data"
