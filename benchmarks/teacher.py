"""What a teacher costs where its parameters live: memory per rank and time of a pass, as ratios to the local one.

    python -m benchmarks.teacher [--layers 16] [--json FILE]

A random Llama of 38 million parameters in float32 (145 MiB), wide for its vocabulary as large models are, read by
`teacher=hf`, `hf_sharded` and `hf_tensor_parallel` on two processes and `hf_offloaded` from disk. `tensors` are the
bytes of all tensors that a process holds after some passes, `peak` is what its resident memory rose by while they ran
and before, pages of files left out: those belong to the disk's cache. Times are medians of a pass in seconds of two
processes that run at once, so on a machine with fewer free cores they say little. Exits 1 where kdcli misses a bar.
"""

from __future__ import annotations

import argparse
import gc
import os
import re
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.bars import Bar, finish
from kdcli.api import Batch, Need
from kdcli.config.build import build
from kdcli.engine.zero import Zero
from tests.distributed import run_ranks

RANKS, ROWS, LENGTH, PASSES = 2, 2, 64, 5
KINDS: dict[str, dict[str, Any]] = {
    "local": {"_target_": "kdcli.teacher.hf.HFTeacher"},
    "sharded": {"_target_": "kdcli.teacher.hf_sharded.HFShardedTeacher"},
    "tensor parallel": {"_target_": "kdcli.teacher.hf_tensor_parallel.HFTensorParallelTeacher"},
    "offloaded": {"_target_": "kdcli.teacher.hf_offloaded.HFOffloadedTeacher", "offload": "disk"},
}
ROOMS = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # give memory back as it is freed
Row = dict[str, Any]


def write(folder: Path, layers: int) -> str:
    """A model of that many layers, with the tokenizer of kdcli's own. Its file is in bfloat16, since parameters of the
    file's own type would stay pages of the file, and be nobody's memory."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from kdcli.store import paths

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(paths.resolve("recipes://data/tiny_teacher"))
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=1024,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def measure(node: Row) -> Row:
    """Of one kind of teacher, on this rank."""
    from kdcli.api import Teacher

    engine = Zero(precision="fp32")
    engine.start()
    with torch.no_grad():  # what a first pass and a first load bring into the process for good
        build(KINDS["local"] | {"path": "recipes://data/tiny_teacher", "dtype": "float32"}, Teacher).load(engine.device)
    before, began = tensors(), resident()
    with _Peak() as peak:
        teacher = build(node, Teacher)
        teacher.place(engine)
        teacher.load(engine.device)
        loaded = peak.value
        batch, seconds, needs = rows(engine.rank), [], Need.DISTRIBUTION
        for _ in range(PASSES):
            started = time.perf_counter()
            hidden = teacher.annotate(batch, needs).hidden
            seconds.append(time.perf_counter() - started)
    assert hidden is not None
    total = float(hidden.double().abs().sum())
    del hidden, batch
    found = {
        "tensors_mib": (tensors() - before) / 2**20,
        "peak_loading_mib": loaded - began,
        "peak_mib": peak.value - began,
        "seconds": statistics.median(seconds[2:]),
        "sum": total,
    }
    engine.close()
    return found


def rows(rank: int) -> Batch:
    ids = torch.randint(0, 1024, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(rank))
    whole = torch.ones(ROWS, LENGTH, dtype=torch.bool)
    return Batch(
        input_ids=ids[:, :-1],
        targets=ids[:, 1:],
        mask=whole,
        attention_mask=whole,
        segment=torch.arange(ROWS)[:, None].expand(ROWS, LENGTH),
        weight=torch.ones(ROWS),
    )


def tensors() -> int:
    """Bytes of all tensors of this process, each storage once."""
    gc.collect()
    found = [one for one in gc.get_objects() if type(one) in (torch.Tensor, torch.nn.Parameter)]
    storages = [one.untyped_storage() for one in found if one.device.type == "cpu"]
    return sum({one.data_ptr(): one.nbytes() for one in storages}.values())


def resident() -> float:
    """MiB of memory that is no file's."""
    return int(re.findall(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[0]) / 1024


class _Peak:
    """The most that `resident` has been, looked at every millisecond."""

    def __enter__(self) -> _Peak:
        self.value, self._stop = resident(), threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._stop.wait(0.001):
            self.value = max(self.value, resident())

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def bars(results: dict[str, Row]) -> list[Bar]:
    local = results["local"]

    def ratio(kind: str, key: str, at_most: float) -> Bar:
        what = {"tensors_mib": "tensors", "peak_mib": "peak"}[key]
        return Bar(claim=f"{kind} over local, {what}", measured=results[kind][key] / local[key], at_most=at_most)

    unlike = max(abs(row["sum"] / local["sum"] - 1) for row in results.values())
    return [
        ratio("sharded", "tensors_mib", 0.55),
        ratio("tensor parallel", "tensors_mib", 0.55),
        ratio("offloaded", "tensors_mib", 0.1),
        ratio("sharded", "peak_mib", 0.85),
        ratio("offloaded", "peak_mib", 0.3),
        Bar(claim="difference of what they say, relative", measured=unlike, at_most=1e-5),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    from benchmarks.teacher import measure  # by the name under which ranks find it too

    os.environ |= ROOMS
    results: dict[str, Row] = {}
    print(
        f"{'':>16} {'tensors MiB':>11} {'of local':>8} {'peak MiB':>8} {'loading':>8} {'s a pass':>8} {'of local':>8}"
    )
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder), options.layers)
        for kind, node in KINDS.items():
            of_ranks = run_ranks(RANKS, measure, node | {"path": path, "dtype": "float32"})
            results[kind] = row = {key: max(one[key] for one in of_ranks) for key in of_ranks[0]}
            local = results["local"]
            print(
                f"{kind:>16} {row['tensors_mib']:11.1f} {row['tensors_mib'] / local['tensors_mib']:8.2f} "
                f"{row['peak_mib']:8.1f} {row['peak_loading_mib']:8.1f} {row['seconds']:8.3f} "
                f"{row['seconds'] / local['seconds']:8.2f}",
                flush=True,
            )
    checked = bars(results)
    return finish({"teacher": results}, checked, options.json)


if __name__ == "__main__":
    sys.exit(main())
