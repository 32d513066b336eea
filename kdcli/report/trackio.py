"""Trackio, through its library: a local dashboard (`trackio show`), or one in a Space."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdcli.api import Reporter
from kdcli.report._tracked import identity, library, numbers, require, shown


class Trackio(Reporter):
    """Stores on this machine (TRACKIO_DIR, or trackio's own folder) unless `space_id` names a Space to send to.
    Raises ConfigError if trackio is not installed."""

    def __init__(self, *, project: str = "kdcli", space_id: str | None = None) -> None:
        require("trackio", "trackio")
        self.project = project
        self.space_id = space_id
        self._run: Any = None

    def start(self, info: Mapping[str, Any]) -> None:
        trackio = library("trackio")

        folder = Path(info["dir"])
        self._run = trackio.init(
            project=self.project,
            name=f"{info['name']}-{identity(folder, 'trackio')}",  # trackio goes on with a run of the same name
            space_id=self.space_id,
            config=shown(info["config"]),
            resume="allow",
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(numbers(metrics), step=step)

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()
