"""A rank that writes a teacher's signal: what is not in the store yet, its share of it."""

from __future__ import annotations

import errno
import logging
import shlex
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdcli import __version__
from kdcli.api import Batch, Data, Engine, Reporter, Student, Teacher
from kdcli.config.build import build, build_terms
from kdcli.errors import ConfigError, Interrupted, KDError
from kdcli.report._numbers import clock, speed
from kdcli.store import signals
from kdcli.store.fault import fault
from kdcli.store.metrics import MetricsLog
from kdcli.store.signals_capture import capture
from kdcli.store.signals_codec import Codec
from kdcli.store.signals_keys import as_keys, key_of_segment, wanted_of_segment
from kdcli.store.signals_shard import ShardWriter
from kdcli.store.status import utc_now
from kdcli.store.tokens import Row, Segment
from kdcli.text.collate import collate
from kdcli.text.signals import open_store
from kdcli.text.tokenize import encode
from kdcli.text.vocabulary import share_ids
from kdcli.train.interrupt import Interrupt
from kdcli.worker.parts import change_status, close, started

log = logging.getLogger(__name__)

LINES = 100  # of progress
SCANNED = 4096  # segments looked up at a time


def work(run_dir: Path, config: Mapping[str, Any], interrupt: Interrupt) -> None:
    """Write what the store lacks. Raises ConfigError where it holds something else, KDError for a full disk."""
    with started(config) as engine:
        teacher, student = build(config["teacher"], Teacher), build(config["student"], Student)
        other = teacher.load_tokenizer()
        tokenizer = student.prepared(student.load_tokenizer() or other)
        if not share_ids(other.get_vocab(), tokenizer.get_vocab()):
            raise ConfigError(
                "student: its tokenizer is not the teacher's, and a cache holds what is said of its tokens"
            )
        if engine.rank == 0:
            path, _, identity = open_store(config["cache"], teacher, tokenizer)
            facts = {"teacher_config": dict(config["teacher"]), "made": utc_now(), "kdcli": __version__}
            signals.create(path, identity, tokenizer, facts)
        engine.gather(None)  # no rank looks at what rank 0 has made in part
        path, codec, _ = open_store(config["cache"], teacher, tokenizer)
        with signals.only_writer(path) if engine.rank == 0 else nullcontext():
            rows, counts = encode(
                build(config["data"], Data),
                tokenizer,
                columns={"rejected"} if config["cache"]["rejected"] else (),
                **{key: config["batch"][key] for key in ("max_length", "overflow")},
            )
            log.info("data: %s", counts)
            _mend(path, engine)
            todo = _todo(path, [segment for part in rows.values() for segment in [part.segments]], engine)
            teacher.place(engine)
            teacher.load(engine.device)
            writer = ShardWriter(path, size=config["cache"]["shard_mib"] * 2**20, rank=engine.rank)
            interrupt.defer()
            with _told_of_a_full_disk(path):
                _write(run_dir, config, engine, teacher, codec, todo, writer, interrupt, tokenizer.pad_token_id or 0)
            engine.gather(None)  # all shards are there
            if engine.rank == 0:
                signals.write_index(path)
    if engine.rank == 0:
        _tell(path)
        change_status(run_dir, "done", exit_code=0)


@dataclass(frozen=True)
class Todo:
    """What this rank has to ask for: segments by their place, the longest first."""

    segments: Sequence[Sequence[Segment]]  # of each domain
    places: np.ndarray  # [n, 2] domain, segment
    stored: Mapping[tuple[int, int], np.ndarray]  # positions that are there already, of segments that want more
    skipped: int  # segments, of this rank's, that are there

    def batches(self, micro_size: int, pad_id: int) -> Iterator[Batch]:
        for start in range(0, len(self.places), micro_size):
            places = [(int(a), int(b)) for a, b in self.places[start : start + micro_size]]
            batch = collate([Row((self.segments[a][b],)) for a, b in places], pad_id=pad_id)
            for line, place in enumerate(places):
                if (more := self.stored.get(place)) is not None:
                    batch.mask[line, : len(more)] |= torch.from_numpy(more)
            yield batch


def _mend(path: Path, engine: Engine) -> None:
    """Read all shards, each rank its share, and take away those that are damaged: they are written again."""
    names = signals.shard_names(path)
    found = [one for part in engine.gather(signals.mend(path, names[engine.rank :: engine.world_size])) for one in part]
    if engine.rank == 0:
        signals.clean(path)
        for one in found:
            log.warning("%s: the shard %s; its sequences are written again", path, one)


def _todo(path: Path, segments: Sequence[Sequence[Segment]], engine: Engine) -> Todo:
    """This rank's share, by key, of what is not stored: each sequence once, and the same for any number of domains."""
    store = signals.Signals(path)
    places: list[tuple[int, int, int]] = []
    stored: dict[tuple[int, int], np.ndarray] = {}
    taken: set[tuple[int, int]] = set()
    skipped = 0
    for domain, own in enumerate(segments):
        for start in range(0, len(own), SCANNED):
            part = [(number, own[number]) for number in range(start, min(start + SCANNED, len(own)))]
            keyed = [(number, one, key_of_segment(one)) for number, one in part]
            keyed = [one for one in keyed if one[2][1] % engine.world_size == engine.rank and one[2] not in taken]
            for (number, one, key), entry in zip(keyed, store.find(as_keys([k for *_, k in keyed])), strict=True):
                wanted = wanted_of_segment(one)
                if key in taken or not wanted.any():
                    continue
                taken.add(key)
                if entry >= 0 and store.covered(int(entry), wanted):
                    skipped += 1
                    continue
                if entry >= 0:
                    stored[domain, number] = store.block(int(entry))[0]
                places.append((domain, number, len(one)))
    ordered = sorted(places, key=lambda place: -place[2])
    return Todo(segments, np.array([place[:2] for place in ordered], np.int64).reshape(-1, 2), stored, skipped)


def _write(
    run_dir: Path,
    config: Mapping[str, Any],
    engine: Engine,
    teacher: Teacher,
    codec: Codec,
    todo: Todo,
    writer: ShardWriter,
    interrupt: Interrupt,
    pad_id: int,
) -> None:
    """Ask the teacher, batch by batch; as often on every rank, as a teacher that is spread over them needs."""
    micro_size = config["batch"]["micro_size"]
    mine = -(-len(todo.places) // micro_size)
    rounds = max(engine.gather(mine))
    progress = Progress(run_dir, config, rounds, engine, todo.skipped)
    batches, last = todo.batches(micro_size, pad_id), None
    for number in range(1, rounds + 1):
        signal_number = max(engine.gather(interrupt.received))
        if signal_number:
            writer.flush()
            engine.gather(None)
            again = "go on with the same command"
            raise Interrupted(signal_number, f"interrupted at {number - 1} of {rounds} rounds, and saved; {again}")
        fault("cache.batch", rank=engine.rank, step=number)
        new = next(batches, None)
        batch = new if new is not None else last
        if batch is None:  # this rank has nothing at all
            batch = _some(todo, pad_id)
        last = batch
        entries = capture(teacher, batch.to(engine.device), codec)
        for entry in entries if new is not None else []:
            writer.add(
                entry.sequence.key, entry.sequence.wanted, entry.block, entry.sequence.ids if entry.alone else None
            )
            progress.tokens += int(entry.sequence.wanted.sum())
        progress.bytes = writer.written + writer.held
        progress.log(number)
    writer.flush()
    progress.close()


def _some(todo: Todo, pad_id: int) -> Batch:
    """Any row, for a rank that only takes part."""
    first = next(own for own in todo.segments if len(own))
    batch = collate([Row((first[0],))], pad_id=pad_id)
    return replace(batch, mask=torch.zeros_like(batch.mask))


@contextmanager
def _told_of_a_full_disk(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = shutil.disk_usage(path).free / 2**20
        raise KDError(
            f"no space left on the disk of {path} ({free:,.0f} MiB are free); what is written stays usable: make room, "
            "and run the same command again, which goes on from there"
        ) from error


class Progress:
    """A line now and then: of all ranks together."""

    def __init__(self, run_dir: Path, config: Mapping[str, Any], rounds: int, engine: Engine, skipped: int) -> None:
        self.rounds, self.engine, self.run_dir = rounds, engine, run_dir
        self.tokens = self.bytes = 0
        self.every = max(1, rounds // LINES)
        self.began = time.monotonic()
        told = engine.sum({"skipped": float(skipped)})
        self.reporters: list[Reporter] = []
        if engine.rank:
            return
        self.reporters = list(build_terms(config.get("report"), Reporter).values())
        for reporter in self.reporters:
            reporter.start(
                {"dir": run_dir, "name": config["run"]["name"], "steps": rounds, "step": 0, "config": config}
            )
        if told["skipped"]:
            print(f"cache: {int(told['skipped']):,} sequences are there already", flush=True)
        if not rounds:
            print("cache: nothing is missing", flush=True)

    def log(self, number: int) -> None:
        if number % self.every and number != self.rounds:  # every rank at the same rounds: a collective follows
            return
        total = self.engine.sum({"tokens": float(self.tokens), "bytes": float(self.bytes)})
        if self.engine.rank:
            return
        seconds = max(1e-9, time.monotonic() - self.began)
        left = seconds / number * (self.rounds - number)
        facts = {
            "cache/tokens": total["tokens"],
            "cache/bytes": total["bytes"],
            "tokens_per_second": total["tokens"] / seconds,
        }
        MetricsLog(self.run_dir).append(number, facts)
        for reporter in self.reporters:
            reporter.log(number, facts)
        line = f"cache {number}/{self.rounds} | {total['tokens']:,.0f} tokens | {speed(facts['tokens_per_second'])}"
        eta = f" | ETA {clock(left)}" if number < self.rounds else ""
        print(f"{line} | {total['bytes'] / 2**20:,.1f} MiB{eta}", flush=True)

    def close(self) -> None:
        close(self.reporters)


def _tell(path: Path) -> None:
    store = signals.Signals(path)
    targets = sum(shard.targets for shard in store.shards)
    size = sum(shard.file.size for shard in store.shards)
    where = shlex.quote(str(path))
    print(
        f"\ncache: {path}, {len(store):,} sequences, {targets:,} targets, {size / max(1, targets):.0f} bytes each\n"
        f"next:  kdcli cache --stats {where}\n"
        f"       kdcli distill teacher=cached teacher.path={where} …",
        flush=True,
    )
