"""What the trackers share: the library they need, the config without secrets, numbers alone, one identity per run."""

from __future__ import annotations

import importlib
import importlib.util
import math
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdcli.errors import ConfigError
from kdcli.store import atomic
from kdcli.store.log import SECRET_NAME, redact


def require(option: str, module: str, *, extra: str = "track") -> None:
    """Raise ConfigError if a reporter's library is not installed."""
    try:
        found = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a parent package
        found = False
    if not found:
        raise ConfigError(f'report={option} needs {module}, which is not installed: `pip install "kdcli[{extra}]"`')


def library(module: str) -> Any:
    """A tracker's library, by name: our modules are called like it."""
    return importlib.import_module(module)


def shown(config: Any, name: str = "") -> Any:
    """The config with `***` for whatever looks like a secret; `${oc.env:NAME}` stays, it is only a name."""
    if isinstance(config, Mapping):
        return {str(key): shown(value, str(key)) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [shown(value, name) for value in config]
    if isinstance(config, str) and not config.startswith("${oc.env:"):
        return "***" if SECRET_NAME.search(name) else redact(config)
    return config


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    leaves: dict[str, Any] = {}
    for key, value in config.items():
        leaves |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return leaves


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers among the metrics; no text ever leaves for a tracker."""
    return {k: float(v) for k, v in metrics.items() if isinstance(v, int | float) and math.isfinite(v)}


def identity(run_dir: Path, tracker: str, make: Any = lambda: uuid.uuid4().hex[:12]) -> str:
    """What `make` gave when this run folder first used the tracker: a run that goes on stays one run there."""
    file = Path(run_dir) / f".{tracker}-run"
    if not file.exists():
        atomic.write_text(file, make())
    return file.read_text("utf-8")
