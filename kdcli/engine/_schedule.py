"""A schedule that goes on where another stopped, with its own settings: a changed lr or length takes effect."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch.optim.lr_scheduler import LambdaLR

MOVING = {
    "last_epoch",
    "_step_count",
    "_last_lr",
    "_schedulers",
    "_get_lr_called_within_step",
    "_is_initial",
    "lr_lambdas",
}


def go_on(schedule: Any, saved: Mapping[str, Any], groups: list[dict[str, Any]], built: list[dict[str, Any]]) -> None:
    """Put `schedule` at the step that `saved` was at, and give the optimizer's `groups` the settings they were
    `built` with and the learning rate of that step. Unchanged settings give the saved rate, bit for bit."""
    own = schedule.state_dict()
    schedule.load_state_dict(dict(saved))
    changed = False
    for part, settings in _parts(schedule, own):
        for name in settings.keys() - MOVING:
            changed |= getattr(part, name) != settings[name]
            setattr(part, name, settings[name])
    for group, settings, lr in zip(groups, built, _rates(schedule, own, saved, changed), strict=True):
        group.update({**settings, "lr": lr})
    schedule._last_lr = [group["lr"] for group in groups]


def _rates(schedule: Any, own: Mapping[str, Any], saved: Mapping[str, Any], changed: bool) -> list[float]:
    if isinstance(schedule, LambdaLR):
        factors = [factor(schedule.last_epoch) for factor in schedule.lr_lambdas]
        return [float(base * factor) for base, factor in zip(schedule.base_lrs, factors, strict=True)]
    if changed and hasattr(schedule, "_get_closed_form_lr"):
        return list(schedule._get_closed_form_lr())
    scale = [new / old if old else 1.0 for new, old in zip(_bases(own), _bases(saved), strict=True)]
    return [rate * factor for rate, factor in zip(saved["_last_lr"], scale, strict=True)]


def _bases(state: Mapping[str, Any]) -> list[float]:
    """The rate that each group's schedule is relative to."""
    return state["base_lrs"] if "base_lrs" in state else _bases(state["_schedulers"][0])


def _parts(schedule: Any, settings: Mapping[str, Any]) -> Iterator[tuple[Any, Mapping[str, Any]]]:
    """The schedule and the schedules it is made of, each with its settings."""
    yield schedule, settings
    inner = settings.get("_schedulers", ())
    for part, its in zip(getattr(schedule, "_schedulers", ()), inner, strict=True):
        yield from _parts(part, its)
