"""Weights & Biases, through its library: numbers and the config, nothing of the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from kdcli.api import Reporter
from kdcli.report._tracked import identity, library, numbers, require, shown


class WandB(Reporter):
    """`mode: offline` writes to the run folder alone, for `wandb sync` later. The key is WANDB_API_KEY or what
    `wandb login` has stored. Console output, code, git and machine facts are not sent.

    Raises ConfigError if wandb is not installed.
    """

    def __init__(
        self,
        *,
        project: str = "kdcli",
        entity: str | None = None,
        tags: Sequence[str] = (),
        mode: Literal["online", "offline", "disabled"] = "online",
    ) -> None:
        require("wandb", "wandb")
        self.project = project
        self.entity = entity
        self.tags = list(tags)
        self.mode = mode
        self._run: Any = None

    def start(self, info: Mapping[str, Any]) -> None:
        wandb = library("wandb")

        quiet = {"console": "off", "disable_code": True, "disable_git": True, "x_disable_meta": True, "silent": True}
        self._run = wandb.init(
            project=self.project,
            entity=self.entity,
            name=info["name"],
            tags=self.tags,
            mode=self.mode,
            dir=str(info["dir"]),
            config=shown(info["config"]),
            id=identity(info["dir"], "wandb"),
            resume="allow",
            settings=wandb.Settings(**quiet),
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(numbers(metrics), step=step)

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()
