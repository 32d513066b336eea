"""The arithmetic of benchmarks/ddk.py."""

from __future__ import annotations

import pytest

from benchmarks.ddk import computed, measured


def test_operations_of_probes_over_those_of_steps() -> None:
    """2 domains x 5 rows, 2 intervals of 10 steps x 4 rows, P = 1 and 3: the student three times and the teacher once,
    10 x 2 x (3 + 3) = 120, over 2 x 40 x (6 + 6) = 960."""
    held = {"domains": 2, "rows": 5, "interval": 10, "batch": 4, "intervals": 2}
    assert computed(1.0, 3.0, held) == pytest.approx(120 / 960)


def test_the_first_probe_and_a_slow_step_do_not_count() -> None:
    """Steps of 10 tokens at 10 tokens/s take 1 s, one took 20; probes after the first 0.5 s: 0.5 / (2 x 1)."""
    lines = [{"step": 0, "probe/seconds": 9.0}]
    for step in range(1, 7):
        speed = 0.5 if step == 3 else 10.0
        line = {"step": step, "tokens": 10.0 * step, "tokens_per_second": speed}
        lines.append(line | ({"probe/seconds": 0.5} if step % 2 == 0 else {}))
    found = measured(lines, 2)
    assert found["share"] == pytest.approx(0.25)
    assert (found["seconds_per_step"], found["seconds_of_the_first_probe"]) == (1.0, 9.0)
