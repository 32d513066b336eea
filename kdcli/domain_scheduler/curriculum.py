"""Stages of domains, from easy to hard."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from kdcli.api import DomainLoss, DomainScheduler
from kdcli.domain_scheduler._adaptive import Quota
from kdcli.domain_scheduler._updates import normalized
from kdcli.errors import ConfigError


class Curriculum(DomainScheduler):
    """Each of `stages` names its domains and how many optimizer steps it takes; the last one lasts to the end. Within a
    stage domains are drawn in proportion to their rows. With `keep` the domains of earlier stages stay, so that stages
    are growing prefixes (the baby steps of POCL, arXiv:2506.05695); without it each stage replaces the one before.
    A domain of no stage is not drawn.

    Raises ConfigError for stages without steps or domains and, once the domains are known, for one that does not exist.
    """

    def __init__(self, *, stages: Sequence[Mapping[str, Any]], keep: bool = True, quota: Quota = "iid") -> None:
        if not stages:
            raise ConfigError("domain_scheduler.stages is empty; give [{steps: 1000, domains: [easy]}, …]")
        self.ends: list[int] = []  # the step after which a stage is over, of all but the last
        self.stages = [_domains(stage, index) for index, stage in enumerate(stages)]
        for index, stage in enumerate(stages[:-1]):
            self.ends.append((self.ends[-1] if self.ends else 0) + _steps(stage, index))
        if keep:
            self.stages = [list(chain(*self.stages[: index + 1])) for index in range(len(stages))]
        self.interval = math.gcd(*self.ends)  # so that updates come where stages end; 0 with one stage
        self.quota = quota
        self.sizes: dict[str, int] = {}
        self.updates = 0

    def initial(self, sizes: Mapping[str, int]) -> dict[str, float]:
        self.sizes = dict(sizes)
        for index, stage in enumerate(self.stages):
            for name in stage:
                if name not in sizes:
                    near = difflib.get_close_matches(name, list(sizes), n=1)
                    hint = f"did you mean {near[0]}?" if near else f"domains are {', '.join(sizes)}"
                    raise ConfigError(f"domain_scheduler.stages.{index}: the data have no domain {name}; {hint}")
            if not any(sizes[name] for name in stage):
                raise ConfigError(f"domain_scheduler.stages.{index}: none of its domains has a row")
        return self._weights()

    def update(self, weights: Mapping[str, float], losses: Mapping[str, DomainLoss]) -> dict[str, float]:
        del weights, losses
        self.updates += 1
        return self._weights()

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.updates = state["updates"]

    def _weights(self) -> dict[str, float]:
        done = self.updates * self.interval
        stage = self.stages[sum(end <= done for end in self.ends)]
        return normalized({name: float(size if name in stage else 0) for name, size in self.sizes.items()})


def _domains(stage: Mapping[str, Any], index: int) -> list[str]:
    names = stage.get("domains")
    unknown = set(stage) - {"steps", "domains"}
    if unknown or not isinstance(names, Sequence) or isinstance(names, str) or not names:
        raise ConfigError(f"domain_scheduler.stages.{index}: give {{steps: 1000, domains: [easy]}}, not {dict(stage)}")
    return [str(name) for name in names]


def _steps(stage: Mapping[str, Any], index: int) -> int:
    steps = stage.get("steps")
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ConfigError(
            f"domain_scheduler.stages.{index}.steps is {steps}; give the optimizer steps of the stage (the last one "
            "alone needs none)"
        )
    return steps
