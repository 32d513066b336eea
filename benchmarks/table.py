"""Workloads printed: one row per contender, as ratios to what no distillation can go below."""

from __future__ import annotations

from typing import Any

from benchmarks.contenders import FLOOR, SFT, TOP

Rows = dict[str, dict[str, Any]]
HEAD = f"{'':46} {'seconds':>8} {'÷ floor':>8} {'FLOPs ÷ floor':>14} {'peak MB':>8} {'÷ SFT':>6} {'gradient off':>13}"


def floor_of(row: dict[str, Any], rows: Rows) -> dict[str, Any] | None:
    """What a row is compared with: SFT and the teacher's forward, or SFT alone where there is no teacher to run."""
    return rows.get(SFT if row["objective"] == TOP or row["tool"] == "kdcli, SFT" else FLOOR)


def show(title: str, rows: Rows) -> None:
    print(f"\n{title}\n{HEAD}")
    for name, row in rows.items():
        print(f"{name:46} {_numbers(row, rows)}", flush=True)


def _numbers(row: dict[str, Any], rows: Rows) -> str:
    if "absent" in row:
        return row["absent"]
    if "void" in row:
        return f"void: {row['void']}, loss by {row['loss_error']:.0e}, gradient by {row['gradient_error']:.0e}"
    floor, sft = floor_of(row, rows), rows.get(SFT)
    seconds = f"{row['seconds']:8.2f}" if "seconds" in row else ""
    ratio = f"{row['seconds'] / floor['seconds']:8.2f}" if floor and seconds else ""
    flops = f"{row['flops'] / floor['flops']:14.3f}" if floor else f"{row['flops'] / 1e9:11.1f} GF"
    peak = f"{row['peak_bytes'] / sft['peak_bytes']:6.2f}" if sft else ""
    error = f"{row['gradient_error']:13.0e}" if "gradient_error" in row else ""
    return f"{seconds:>8} {ratio:>8} {flops:>14} {row['peak_bytes'] / 1e6:8.0f} {peak:>6} {error}"
