"""What a step's rows cost: the loader over 10,000 to 10 million memory-mapped rows in 10 to 1,000 domains.

    python -m benchmarks.loader [--steps 2000] [--json FILE]

Each line is a process of its own: it opens the files, draws batches of 32 rows of 128 tokens and collates them in
micro-batches of 4, by independent draws and by hamilton's quotas. `touched` are memory-mapped pages that were read:
they belong to the disk's cache, and the system takes them back when it needs memory; `held` is what the process itself
took while it drew. Times are medians of CPU seconds over a quarter of the steps, of the quickest quarter: other
processes of a shared machine empty its caches. The files (about 8 GB for ten million rows) are made in a temporary
folder. Exits 1 where kdcli misses a bar.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.bars import Bar, finish
from kdcli.store.tokens import BLOCK, SCHEMA, Segment, Segments, SegmentWriter, TokenRows
from kdcli.train.loader import Loader

TOKENS, BATCH, MICRO = 128, 32, 4  # tokens of a row, rows of a step and of a micro-batch
SIZES = [(10, 10_000), (10, 100_000), (10, 1_000_000), (10, 10_000_000), (100, 1_000_000), (1_000, 1_000_000)]
QUICKSTART = 140.0  # tokens that a second of the quickstart's training takes on the machine of README
Row = dict[str, Any]


def write(folder: Path, domains: int, rows: int) -> None:
    """`domains` files of equally many rows in all; a file's full blocks are one block again and again."""
    with SegmentWriter(folder / "block.arrow") as writer:
        for row in range(BLOCK):
            ids = np.arange(row, row + TOKENS, dtype=np.int32)
            writer.add(Segment(ids=ids, mask=np.ones(TOKENS, bool), key=f"{row:032x}"))
    block = pa.ipc.open_file(pa.memory_map(str(folder / "block.arrow"))).get_batch(0)
    for domain in range(domains):
        with pa.OSFile(str(folder / f"{domain}.arrow"), "wb") as file, pa.ipc.new_file(file, SCHEMA) as out:
            for start in range(0, rows // domains, BLOCK):
                out.write_batch(block.slice(0, min(BLOCK, rows // domains - start)))


def measure(folder: Path, domains: int, quota: Any, steps: int) -> Row:
    """Draw and collate `steps` steps."""
    began = time.perf_counter()
    rows = {f"d{n}": TokenRows(Segments(folder / f"{n}.arrow", f"d{n}")) for n in range(domains)}
    weights = {f"d{n}": 1.0 + n % 7 for n in range(domains)}
    loader = Loader(rows, batch_size=BATCH, micro_size=MICRO, pad_id=0, seed=0, weights=weights, quota=quota)
    opened = time.perf_counter() - began
    seconds, held = [], []
    for step in range(steps):
        if step % (steps // 4) == 0:
            held.append(_resident("RssAnon"))
        began = time.process_time()
        loader.next(step)
        seconds.append(time.process_time() - began)
    quarter = steps // 4
    middle = min(statistics.median(seconds[start : start + quarter]) for start in range(0, 4 * quarter, quarter))
    return {
        "rows": sum(map(len, rows.values())),
        "domains": domains,
        "quota": quota,
        "open_seconds": opened,
        "step_ms": 1e3 * middle,
        "rows_per_second": BATCH / middle,
        "tokens_per_second": BATCH * TOKENS / middle,
        "held_mib": _resident("RssAnon") - held[0],
        "held_mib_second_half": _resident("RssAnon") - held[2],
        "touched_mib": _resident("RssFile"),
    }


def bars(results: list[Row]) -> list[Bar]:
    of = {quota: [row for row in results if row["quota"] == quota] for quota in ("iid", "hamilton")}
    slowest = min(row["tokens_per_second"] for row in results)
    found = [
        Bar(
            claim="20 x the quickstart's tokens a second, over the loader's",
            measured=20 * QUICKSTART / slowest,
            at_most=1,
        )
    ]
    for quota, rows in of.items():
        steps = {(row["domains"], row["rows"]): row["step_ms"] for row in rows}
        few, many = min(steps), max(steps)
        by_rows = [ms for (domains, _), ms in steps.items() if domains == few[0]]
        by_domains = [ms for (_, number), ms in steps.items() if number == many[1]]
        for what, times in (
            (f"{quota}: slowest over fastest step, over rows", by_rows),
            (f"{quota}: the same, over domains", by_domains),
        ):
            found.append(Bar(claim=what, measured=max(times) / min(times), at_most=2.0, aim=1.3))
    held = max(row["held_mib_second_half"] for row in results)
    return [*found, Bar(claim="MiB that the second half of the steps took", measured=held, at_most=16)]


def _resident(kind: str) -> float:
    """MiB."""
    return int(re.findall(rf"{kind}:\s+(\d+)", Path("/proc/self/status").read_text())[0]) / 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--most", type=int, default=10_000_000, help="rows; leaves larger sizes out")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results: list[Row] = []
    print(
        f"{'rows':>10} {'domains':>7} {'quota':>8} {'open s':>7} {'step ms':>8} {'tok/s':>9} {'held MiB':>8} "
        f"{'touched':>8}"
    )
    for domains, rows in SIZES:
        if rows > options.most:
            continue
        folder = Path(tempfile.mkdtemp())
        try:
            write(folder, domains, rows)
            for quota in ("iid", "hamilton"):
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    row = pool.apply(measure, (folder, domains, quota, options.steps))
                results.append(row)
                print(
                    f"{row['rows']:10,} {domains:7,} {quota:>8} {row['open_seconds']:7.2f} {row['step_ms']:8.2f} "
                    f"{row['tokens_per_second']:9,.0f} {row['held_mib']:8.1f} {row['touched_mib']:8.0f}",
                    flush=True,
                )
        finally:
            shutil.rmtree(folder)
    checked = bars(results)
    return finish({"loader": results}, checked, options.json)


if __name__ == "__main__":
    sys.exit(main())
