"""What DDK costs over plain distillation: its probes, as a share of the time between them.

    python -m benchmarks.ddk [--intervals 4] [--steps 51] [--rows 1] [--json FILE] [-- OVERRIDE ...]

A run of recipe ddk/tiny whose probes are to its training as the paper's are: there 10 domains x 500 rows to 1,000 steps
x 256 rows, one row to 51; here 8 domains x `rows` to `steps` steps x 8 rows. Measured: seconds per probe (after step 0,
the teacher's half is computed once) over the median seconds of the steps between two. The bar is 1 % of step time;
the paper reports 0.69 % more operations (Table 12).

Also computed, from parameters alone, for the paper's pair: forward 2P operations per token, backward 4P.

Exits 1 where the bar is missed. Overrides after `--` go to `kdcli distill`, such as other models.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdcli.store import metrics

BAR = 0.01
PAPER = {"domains": 10, "rows": 500, "interval": 1000, "batch": 256, "intervals": 30}
STUDENT, TEACHER = 1.84e9, 14.17e9  # parameters of Qwen1.5 1.8B and 14B


def computed(student: float, teacher: float, held: dict[str, int]) -> float:
    """Operations of the probes over those of the steps: the student's forward each time, the teacher's once."""
    probed = held["domains"] * held["rows"]
    step_rows = held["interval"] * held["batch"]
    probes = probed * 2 * (student * (held["intervals"] + 1) + teacher)
    return probes / (held["intervals"] * step_rows * (6 * student + 2 * teacher))


def run(intervals: int, steps: int, rows: int, overrides: Sequence[str]) -> list[dict[str, Any]]:
    """The metrics of one run with a probe of `rows` per domain every `steps` steps."""
    with tempfile.TemporaryDirectory() as folder:
        sizes = [f"run.dir={folder}/run", f"run.steps={steps * intervals + 1}", f"probe.rows={rows}"]
        more = [f"domain_scheduler.interval={steps}", "evaluation.heldout.rows=1", *overrides]
        command = [sys.executable, "-m", "kdcli", "distill", "+recipe=ddk/tiny", *sizes, *more]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr[-2000:])
        return metrics.read(Path(folder) / "run")


def measured(lines: Sequence[dict[str, Any]], interval: int) -> dict[str, float]:
    """Seconds per step and per probe, and their ratio over an interval; medians, so that a pause counts little."""
    tokens = {line["step"]: line["tokens"] for line in lines if "tokens" in line}
    steps = [
        (tokens[line["step"]] - tokens.get(line["step"] - 1, 0.0)) / line["tokens_per_second"]
        for line in lines
        if "tokens_per_second" in line
    ]
    probes = {line["step"]: line["probe/seconds"] for line in lines if "probe/seconds" in line}
    step, probe = statistics.median(steps), statistics.median(s for at, s in probes.items() if at)
    return {
        "seconds_per_step": step,
        "seconds_per_probe": probe,
        "seconds_of_the_first_probe": probes[0],
        "share": probe / (interval * step),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--intervals", type=int, default=4)
    parser.add_argument("--steps", type=int, default=51, help="optimizer steps between probes")
    parser.add_argument("--rows", type=int, default=1, help="held-out rows per domain")
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_args(argv)
    found = measured(run(given.intervals, given.steps, given.rows, given.overrides), given.steps)
    found["computed_share_qwen"] = computed(STUDENT, TEACHER, PAPER)
    print(f"a step {found['seconds_per_step']:.3f} s, a probe {found['seconds_per_probe']:.3f} s ", end="")
    print(f"(the first, with the teacher's half, {found['seconds_of_the_first_probe']:.3f} s)")
    print(f"measured: probes take {100 * found['share']:.2f} % of the steps' time (bar: {100 * BAR:.0f} %)")
    print(
        f"computed for Qwen1.5 14B to 1.8B: {100 * found['computed_share_qwen']:.2f} % more operations (paper: 0.69 %)"
    )
    if given.json:
        given.json.write_text(json.dumps({"machine": platform.processor() or platform.machine(), **found}, indent=2))
    return 0 if max(found["share"], found["computed_share_qwen"]) <= BAR else 1


if __name__ == "__main__":
    sys.exit(main())
