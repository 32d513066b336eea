"""A million rows through the steps rules and dedup (MinHash): rows a second, memory, and which duplicates are found.

    python -m benchmarks.augment_rows [--rows 1000000] [--json FILE]

Rows are made as they are read: prompts of 24 to 72 words, Zipf-distributed over 50,000, and a response; one in ten has
the prompt of some row before it with up to one word in 24 exchanged. A pair counts as planted where the true Jaccard
similarity of its word trigrams is at least the threshold (0.7), and near where it is at least 0.8. A row set aside is a
false one where its original (and whatever that is a copy of) is below 0.7 - 3 standard errors of the estimate. Each
size runs in a process of its own, whose peak of resident memory is read at its end: a tenth of the rows, all of them,
and a tenth with rows four times as long.

Flat: memory must grow by less than 32 bytes a row, whatever a row's length: what is left is the benchmark's own notes
(8 bytes for each row set aside) and the allocator's slack. The index itself, 550 to 800 bytes a row, lies in files of
the step's folder. `cpu_microseconds_a_row` counts this process alone, as clocks of a busy machine count its neighbours.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import random
import resource
import sys
import tempfile
import time
from array import array
from bisect import bisect
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from benchmarks.bars import Bar, finish
from kdcli.api import Example
from kdcli.augmentation._minhash import HASHES, jaccard
from kdcli.augmentation.dedup import Dedup
from kdcli.augmentation.rules import Rules

THRESHOLD = 0.7
FALSE_BELOW = THRESHOLD - 3 * (THRESHOLD * (1 - THRESHOLD) / HASHES) ** 0.5
SOUNDS = ("bcdfghjklmnprstvwxyz", "aeiouy") * 2 + ("bdgklmnrst",)
VOCABULARY = ["".join(letters) for letters in itertools.islice(itertools.product(*SOUNDS), 0, None, 2)][:50_000]
SUMS = list(itertools.accumulate(1 / (rank + 10) for rank in range(len(VOCABULARY))))
WORDS = (24, 72)  # of a prompt
COPIES = 10  # one row in so many is a near-duplicate
FLAT = 32.0  # bytes a row
WIDER = 16.0  # MiB, of a block of 256 rows
Result = dict[str, Any]


class Desk:
    """What a step needs of a run: a folder, and a place for what is set aside, of which the row's number is noted."""

    step, rehearsal = "dedup", False

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.dropped = array("q")
        self.reasons: dict[str, int] = {}

    def aside(self, example: Example, reason: str, detail: str = "", text: str = "") -> None:
        self.reasons[reason] = self.reasons.get(reason, 0) + 1
        if reason == "duplicate":
            self.dropped.append(example.meta["id"])


class Rows:
    """The same rows each time they are made; row i is a copy where i % 10 is 9."""

    def __init__(self, count: int, scale: int = 1) -> None:
        self.count, self.scale = count, scale
        self.seconds = 0.0  # spent on making rows

    def __iter__(self) -> Iterator[Example]:
        for number in range(self.count):
            began = time.perf_counter()
            draw = random.Random(number)
            prompt, response = self.prompt(number), self._text(draw, draw.randint(20, 40))
            row = Example(prompt=prompt, response=response, meta={"id": number, "license": "CC0-1.0"})
            self.seconds += time.perf_counter() - began
            yield row

    def original(self, number: int) -> int | None:
        """The row before it that a row is a copy of."""
        if number % COPIES != COPIES - 1:
            return None
        return random.Random(-number).randrange(number)

    def prompt(self, number: int) -> str:
        source = self.original(number)
        if source is None:
            draw = random.Random(number + (1 << 40))
            return self._text(draw, draw.randint(*WORDS))
        changed = self.prompt(source).split()
        draw = random.Random(-number - (1 << 40))
        for _ in range(1 + int(draw.random() * len(changed) / WORDS[0])):
            changed[draw.randrange(len(changed))] = draw.choice(VOCABULARY)
        return " ".join(changed)

    def _text(self, draw: random.Random, count: int) -> str:
        return " ".join(
            VOCABULARY[min(bisect(SUMS, draw.random() * SUMS[-1]), len(VOCABULARY) - 1)]
            for _ in range(count * self.scale)
        )


def run(count: int, scale: int = 1) -> Result:
    """Both steps over `count` rows, in this process."""
    rows = Rows(count, scale)
    with tempfile.TemporaryDirectory() as name:
        desk = Desk(Path(name))
        rules, dedup = (
            Rules(min_words=5, max_words=10_000, must_not_match=["qqq"], repeats=0.5),
            Dedup(method="minhash", threshold=THRESHOLD),
        )
        rules.open(cast(Any, desk))
        dedup.open(cast(Any, desk))
        before = _peak()
        began, cpu = time.perf_counter(), time.process_time()
        kept = disk = 0
        for kept, _ in enumerate(dedup(rules(rows)), start=1):
            if kept % 1000 == 0:  # its files go when it ends
                disk = sum(file.stat().st_blocks * 512 for file in Path(name).iterdir())
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        peak = _peak()
    return {
        "rows": count,
        "scale": scale,
        "kept": kept,
        "aside": desk.reasons,
        "seconds": round(seconds, 1),
        "seconds_making_rows": round(rows.seconds, 1),
        "cpu_microseconds_a_row": round(1e6 * cpu / count * (1 - rows.seconds / seconds), 1),
        "rows_per_second": round(count / (seconds - rows.seconds)),
        "peak_mib": round(peak / 2**20, 1),
        "before_mib": round(before / 2**20, 1),
        "disk_bytes_a_row": round(disk / count),
        **_found(rows, desk.dropped),
    }


def _found(rows: Rows, dropped: array[int]) -> Result:
    """Of up to 20,000 copies, how many of those that should be found are; and how many rows set aside are false."""
    gone = set(dropped)
    sample = range(COPIES - 1, rows.count, COPIES * max(1, rows.count // (COPIES * 20_000)))
    planted = near = planted_found = near_found = 0
    for number in sample:
        source = rows.original(number)
        if source is None or source in gone:  # what it is a copy of was itself set aside
            continue
        similarity = jaccard(rows.prompt(number), rows.prompt(source))
        if similarity >= THRESHOLD:
            planted, planted_found = planted + 1, planted_found + (number in gone)
        if similarity >= THRESHOLD + 0.1:
            near, near_found = near + 1, near_found + (number in gone)
    checked = dropped[:: max(1, len(dropped) // 20_000)]
    false = sum(not _justified(rows, number) for number in checked)
    return {
        "planted": planted,
        "recall": round(planted_found / max(planted, 1), 4),
        "near": near,
        "recall_near": round(near_found / max(near, 1), 4),
        "checked": len(checked),
        "false": false,
        "precision": round(1 - false / max(len(checked), 1), 5),
    }


def _justified(rows: Rows, number: int) -> bool:
    source = rows.original(number)
    while source is not None:
        if jaccard(rows.prompt(number), rows.prompt(source)) >= FALSE_BELOW:
            return True
        source = rows.original(source)
    return False


def measure(count: int) -> tuple[Result, list[Bar]]:
    """Each size in a fresh process, and the bars."""
    few = max(count // 10, 1000)
    context = multiprocessing.get_context("spawn")
    found: list[Result] = []
    for size, scale in ((few, 1), (count, 1), (few, 4)):
        with context.Pool(1) as pool:
            found.append(pool.apply(run, (size, scale)))
        print(json.dumps(found[-1]), flush=True)
    small, large, wide = found
    growth = (large["peak_mib"] - small["peak_mib"]) * 2**20 / (count - few)
    wider = wide["peak_mib"] - small["peak_mib"]
    result = {"runs": found, "bytes_a_row": round(growth, 1), "mib_of_longer_rows": round(wider, 1)}
    microseconds = 1e6 / large["rows_per_second"]
    bars = [
        Bar(claim=f"bytes of memory for each row more, {few:,} to {count:,} rows", measured=growth, at_most=FLAT),
        Bar(claim="MiB of memory more for rows four times as long", measured=wider, at_most=WIDER),
        Bar(claim="share of planted duplicates (Jaccard >= 0.7) missed", measured=1 - large["recall"], at_most=0.1),
        Bar(claim="share of near duplicates (Jaccard >= 0.8) missed", measured=1 - large["recall_near"], at_most=0.01),
        Bar(claim="share of rows set aside that are no duplicates", measured=1 - large["precision"], at_most=0.001),
        Bar(claim="microseconds a row for rules and dedup", measured=microseconds, at_most=1000, aim=300),
    ]
    return result, bars


def _peak() -> int:
    """Bytes of resident memory at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    found, checked = measure(options.rows)
    return finish(found, checked, options.json)


if __name__ == "__main__":
    sys.exit(main())
