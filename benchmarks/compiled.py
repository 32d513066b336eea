"""Whether torch.compile pays for what lies between two chunks of logits and a gradient: python -m benchmarks.compiled

Milliseconds for 128 targets, as a whole and 16 rows at a time, medians of rounds in random order. Needs a C++ compiler
on a CPU. kdcli compiles nothing: see docs/log.md.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable

import torch
import torch._dynamo
from torch import Tensor

from benchmarks.probes import seconds
from kdcli.ops import divergence

TARGETS, VOCABULARY, ROUNDS = 128, 49_152, 9
Pointwise = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # logits of student and teacher -> value, gradient


def pointwise(gradient: Pointwise) -> Pointwise:
    return lambda student, teacher: gradient(torch.log_softmax(teacher, -1), torch.log_softmax(student, -1))


def main() -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    torch._dynamo.config.recompile_limit = 64  # or the later ones would run as they are written
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator(device).manual_seed(0)
    student = torch.randn(TARGETS, VOCABULARY, generator=generator, device=device)
    teacher = student + torch.randn(TARGETS, VOCABULARY, generator=generator, device=device)

    def over(function: Pointwise, rows: int) -> Callable[[], None]:
        def run() -> None:
            for part in zip(student.split(rows), teacher.split(rows), strict=True):
                function(*part)

        return run

    steps: dict[tuple[str, str], Callable[[], None]] = {}
    for name in ("forward_kl", "generalized_jsd", "skew_kl", "total_variation"):
        eager = pointwise(getattr(divergence, f"{name}_gradient"))
        for rows in (TARGETS, 16):
            fast = torch.compile(eager, dynamic=False)
            once = seconds(over(fast, rows), device)
            expected, found = eager(student[:rows], teacher[:rows])[1], fast(student[:rows], teacher[:rows])[1]
            assert (found - expected).norm() < 1e-4 * expected.norm(), name
            steps[name, f"{rows} rows"] = over(eager, rows)
            steps[name, f"{rows} rows, compiled ({once:.0f} s once)"] = over(fast, rows)
    taken: dict[tuple[str, str], list[float]] = {key: [] for key in steps}
    order = list(steps)
    for _ in range(ROUNDS):
        random.shuffle(order)
        for key in order:
            taken[key].append(seconds(steps[key], device))
    for (name, how), values in taken.items():
        print(f"{name:18} {how:32} {1e3 * statistics.median(values):7.1f} ms")


if __name__ == "__main__":
    main()
