"""What may change between a run and its continuation: some keys freely, some with a warning, some not at all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

REFUSED_IN_FREE = ("run.seed",)
FREE = ("run", "report", "evaluation", "launch", "optimize", "engine.collective_timeout", "augment", "budget", "terms")
OF_WRITERS = (  # how a writer is asked and what that costs, but not who is asked, nor what for
    "api_key_env", "concurrency", "batch", "timeout", "deadline", "retries", "price_prompt", "price_completion"
)  # fmt: skip
WARN = ("optimizer", "lr_schedule", "engine", "batch.micro_size")


class Changes(NamedTuple):
    """Lines such as `lr_schedule.num_warmup_steps: 0 -> 10`, by what they mean for a run that goes on."""

    free: list[str]
    warnings: list[str]
    refusals: list[str]


def compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> Changes:
    """Sort the keys whose values differ. Free: logging, evaluation, processes, more steps. Warned about: what changes
    the course but not the meaning (learning rate, schedule, engine; run.steps, where an objective's schedule is spread
    over them). Refused: models, data, objective, batch, seed (but see
    `moved`)."""
    changes = Changes([], [], [])
    before, after = _flat(old), _flat(new)
    for key in sorted(before.keys() | after.keys()):
        if before.get(key, MISSING) != after.get(key, MISSING):
            _list_of(key, changes).append(f"{key}: {_show(before, key)} -> {_show(after, key)}")
    steps = "run.steps"
    if before.get(steps) != after.get(steps):
        spread = f"spread over {steps}: {_show(before, steps)} -> {_show(after, steps)}"
        changes.warnings.extend(f"{place} {spread}" for place in _spread(new.get("objective") or {}))
    return changes


def moved(changes: Changes) -> Changes:
    """The changes where the data are known to be the same: keys of `data` only say where they lie."""
    data = [line for line in changes.refusals if line.startswith("data.")]
    rest = [line for line in changes.refusals if line not in data]
    return Changes([*changes.free, *data], changes.warnings, rest)


MISSING = object()


def _list_of(key: str, changes: Changes) -> list[str]:
    if _under(key, REFUSED_IN_FREE):
        return changes.refusals
    if _under(key, FREE) or (
        key.startswith("writer.") and key.rpartition(".")[2] in OF_WRITERS and key.count(".") == 2
    ):
        return changes.free
    return changes.warnings if _under(key, WARN) else changes.refusals


def _under(key: str, places: tuple[str, ...]) -> bool:
    return any(key == place or key.startswith(f"{place}.") for place in places)


def _flat(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        elif not isinstance(value, Mapping):
            flat[f"{prefix}{key}"] = value
    return flat


def _spread(objective: Mapping[str, Any]) -> list[str]:
    """The settings of objectives whose schedules take their time from run.steps."""
    from kdcli.train.schedule import KEY, KINDS, is_schedule  # here, because it imports torch

    return [
        f"objective.{term}.{key}"
        for term, node in objective.items()
        for key, value in (node or {}).items()
        if is_schedule(value) and value[KEY] in KINDS and KINDS[value[KEY]].spread
    ]


def _show(flat: Mapping[str, Any], key: str) -> str:
    return repr(flat[key]) if key in flat else "absent"
