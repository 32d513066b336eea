"""metrics.jsonl: one JSON object a line, each step once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdcli.errors import ConfigError
from kdcli.store import atomic
from kdcli.store.fault import fault
from kdcli.store.status import utc_now


class MetricsLog:
    """Appends to `run_dir/metrics.jsonl`, flushed per line."""

    def __init__(self, run_dir: Path) -> None:
        self.path = Path(run_dir) / "metrics.jsonl"

    def append(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one line; numbers that are not finite become null."""
        fault("metrics.append", step=step)
        line = json.dumps(atomic.json_safe({"step": step, "time": utc_now(), **metrics}), allow_nan=False)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(line + "\n")

    def cut(self, step: int) -> None:
        """Drop what was written after `step` (-1: everything), and a torn last line."""
        if self.path.exists():
            kept = [line for line in read(self.path.parent) if line["step"] <= step]
            atomic.write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))


def read(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of `run_dir/metrics.jsonl` in order; a last line torn by a crash is left out."""
    path = Path(run_dir) / "metrics.jsonl"
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    parsed = []
    for number, line in enumerate(lines, start=1):
        try:
            parsed.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise ConfigError(f"{path}:{number}: not JSON; repair or delete this line") from None
    return parsed
