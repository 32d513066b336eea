"""Numbers as people read them: three digits that matter, nothing that a narrow or ASCII terminal cannot show."""

from __future__ import annotations

import math


def number(value: float | None) -> str:
    """2.35, 47.5, 1,234, 1.3M; `-` for a number there is not."""
    if value is None or not math.isfinite(value):
        return "-" if value is None else str(value)
    size = abs(value)
    if size >= 1e9:
        return f"{value:.1e}"
    if size >= 1e6:
        return f"{value / 1e6:.1f}M"
    return f"{value:,.{0 if size >= 100 else 1 if size >= 10 else 2}f}"


def percent(value: float | None) -> str:
    """81% for 0.81."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{100 * value:.0f}%" if abs(value) < 100 else f"{100 * value:.0e}%"


def speed(tokens_per_second: float) -> str:
    """12.3k tok/s."""
    value = tokens_per_second
    return f"{value / 1000:.1f}k tok/s" if value >= 1000 else f"{value:.0f} tok/s"


def clock(seconds: float) -> str:
    """1:20 or 2:03:04."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def money(value: float) -> str:
    """12.34, and what is below a tenth with two digits that matter."""
    return f"{value:,.2f}" if value >= 0.1 or value == 0 else f"{value:.2g}" if value >= 1e-4 else f"{value:.1e}"


def count(value: float) -> str:
    """1,234 and 30.7k, 1.3M."""
    if value >= 1e9:
        return f"{value / 1e9:.1f}G"
    return f"{value:,.0f}" if value < 1e4 else f"{value / 1e3:,.1f}k" if value < 1e6 else f"{value / 1e6:.1f}M"
