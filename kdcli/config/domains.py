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
    if scheduler is None:
        return []
    name = type(scheduler).__name__
    problems = _training_loss(scheduler, config, objects, where)
    if not scheduler.signals & PROBED:
        return problems
    if problem := problem_of(scheduler.signals, objects["teacher"]):
        problems.append(f"{where}: {name} cannot work: {problem}, or choose another domain_scheduler")
    if "alignment" in scheduler.signals and getattr(objects["engine"], "stage", 0) == 3:
        problems.append(
            f"{where}: {name} compares whole gradients, which no process has in ZeRO stage 3; set engine=zero2 or lower"
        )
    return problems + _held_out(config, objects, name)


def _training_loss(scheduler: Any, config: Mapping[str, Any], objects: Mapping[str, Any], where: str) -> list[str]:
    """A training loss that is compared with a reference's cross entropy is one."""
    if not getattr(scheduler, "cross_entropy", False):
        return []
    terms = {place: term for place, term in objects.items() if place.startswith("objective.")}
    odd = [place for place, term in terms.items() if not _is_cross_entropy(term)]
    if not odd and len(terms) == 1 and not _scheduled(config):
        return []
    because = f"{odd[0]} is not its cross entropy" if odd else "that is a weighted sum"
    return [
        f"{where}: {type(scheduler).__name__} compares the student's training loss with a cross entropy, and here "
        f"{because} (one cross_entropy of weight 1 is); set {where}.losses=heldout and a larger {where}.interval, "
        "since each update then takes a probe"
    ]


def _is_cross_entropy(term: Any) -> bool:
    """Whether a term's loss is the mean of -log q over targets."""
    from kdcli.objective.cross_entropy import CrossEntropy

    plain = type(term) is CrossEntropy and not term.label_smoothing
    return plain and term.weight == 1 and term.reduction == "token" and not term.domains


def _scheduled(config: Mapping[str, Any]) -> bool:
    """Whether a number of an objective changes during the run."""
    from kdcli.train.schedule import is_schedule

    nodes = (node for node in config["objective"].values() if node is not None)
    return any(is_schedule(value) for node in nodes for value in node.values())


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
