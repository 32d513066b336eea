"""What a domain scheduler asks of the teacher, the engine and the held-out rows, before anything heavy loads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kdcli.config.build import build
from kdcli.errors import ConfigError


def problems_in(config: Mapping[str, Any], objects: Mapping[str, Any]) -> list[str]:
    """One sentence per contradiction, of a distillation."""
    from kdcli.train.probe import PROBED, problem_of  # here, because it imports torch

    scheduler, where = objects.get("domain_scheduler"), "domain_scheduler"
    if scheduler is None or not scheduler.signals & PROBED:
        return []
    name = type(scheduler).__name__
    problems = []
    if problem := problem_of(scheduler.signals, objects["teacher"]):
        problems.append(f"{where}: {name} cannot work: {problem}, or choose another domain_scheduler")
    if "alignment" in scheduler.signals and getattr(objects["engine"], "stage", 0) == 3:
        problems.append(
            f"{where}: {name} compares whole gradients, which no process has in ZeRO stage 3; set engine=zero2 or lower"
        )
    return problems + _held_out(config, objects, name)


def _held_out(config: Mapping[str, Any], objects: Mapping[str, Any], name: str) -> list[str]:
    """Each domain of the data has held-out rows, where they are data of their own."""
    from kdcli.api import Data

    node = (config.get("probe") or {}).get("data")
    if node is None or objects.get("data") is None:
        return []
    try:
        known, wanted = build(node, Data).domains(), objects["data"].domains()
    except ConfigError as error:
        return [f"probe.data: {problem}" for problem in error.problems]
    return [
        f"probe.data: domain {domain} has no held-out rows ({name} measures each domain; there are "
        f"{', '.join(known)}); add them, or set probe.data=null to hold out some of the training rows"
        for domain in wanted
        if domain not in known
    ]
