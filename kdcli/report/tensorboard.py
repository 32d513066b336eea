"""TensorBoard: event files in the run folder, for `tensorboard --logdir runs`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdcli.api import Reporter
from kdcli.report._tracked import numbers, require, shown


class TensorBoard(Reporter):
    """Writes to the folder `tensorboard` of the run; a run that goes on replaces what it had written after its
    checkpoint. Raises ConfigError if tensorboard is not installed."""

    def __init__(self) -> None:
        require("tensorboard", "tensorboard")
        self._writer: Any = None

    def start(self, info: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(Path(info["dir"]) / "tensorboard"), purge_step=info["step"] + 1)
        self._writer.add_text(
            "config", "```json\n" + json.dumps(shown(info["config"]), indent=2, default=str) + "\n```"
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in numbers(metrics).items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
