"""A composed config, Hydra's own node included, is data: what would import or run code is refused (FAULTS B.1)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from kdcli.config import secrets
from kdcli.config.target import problems_in
from kdcli.errors import ConfigError

PLUGINS = {  # places in Hydra's node that name a class, and which
    "launcher": re.compile(r"hydra\._internal\.core_plugins\.basic_launcher\.BasicLauncher|hydra_plugins\.[\w.]+"),
    "sweeper": re.compile(r"hydra\._internal\.core_plugins\.basic_sweeper\.BasicSweeper|hydra_plugins\.[\w.]+"),
    "sweeper.sampler": re.compile(r"optuna\.samplers\.\w+"),
}
LOG_CLASSES = re.compile(
    r"logging\.(StreamHandler|FileHandler|NullHandler|Formatter)|colorlog\.ColoredFormatter|ext://sys\.std(out|err)"
)


def refuse_code(config: Mapping[str, Any]) -> None:
    """Raises ConfigError for a `_target_`, callback, logging class, hook or literal secret in a config."""
    own = {key: value for key, value in config.items() if key != "hydra"}
    problems = secrets.in_config(own) + problems_in(own) + _hydra_problems(config.get("hydra") or {})
    if problems:
        raise ConfigError(*problems)


def _hydra_problems(node: Mapping[str, Any]) -> list[str]:
    problems = []
    if node.get("callbacks"):
        problems.append("hydra.callbacks: a config may not name callbacks, because they run code")
    if (node.get("job") or {}).get("env_set"):
        problems.append("hydra.job.env_set: a config may not set environment variables; set them in the shell")
    for place, value in _strings(node):
        if place.endswith("._target_"):
            allowed = PLUGINS.get(place.removesuffix("._target_"))
            if not allowed or not allowed.fullmatch(value):
                problems.append(f"hydra.{place}: {value} is not allowed; choose hydra/launcher=… or hydra/sweeper=…")
        elif place.endswith("custom_search_space"):
            problems.append(f"hydra.{place}: a config may not name a function, because it would be run")
        elif place.startswith(("job_logging.", "hydra_logging.")) and _names_a_class(place, value):
            problems.append(f"hydra.{place}: {value} is not a logging class that a config may name")
    return problems


def _names_a_class(place: str, value: str) -> bool:
    named = place.endswith((".class", ".()")) or value.startswith(("ext://", "cfg://"))
    return named and not LOG_CLASSES.fullmatch(value)


def _strings(node: Any, prefix: str = "") -> list[tuple[str, str]]:
    if isinstance(node, Mapping):
        return [
            pair for key, value in node.items() for pair in _strings(value, f"{prefix}.{key}" if prefix else str(key))
        ]
    if isinstance(node, list):
        return [pair for i, value in enumerate(node) for pair in _strings(value, f"{prefix}.{i}")]
    return [(prefix, node)] if isinstance(node, str) else []
