"""Optional packages that a step will need, told before anything is asked: steps import them when they are at work."""

from __future__ import annotations

from collections.abc import Collection
from importlib.util import find_spec
from typing import Any

NEEDED = (  # class, setting, its value -> module
    ("Retrieve", "method", "bm25", "bm25s"),
    ("Trajectory", "tools", "search", "bm25s"),
    ("AnthropicWriter", "model", None, "anthropic"),
)


def problems_of(component: Any, where: str) -> list[str]:
    """A sentence for each package that is missing for a component with these settings."""
    found = []
    for name, setting, value, module in NEEDED:
        if type(component).__name__ != name or not _chosen(getattr(component, setting, None), value):
            continue
        if find_spec(module) is None:
            what = f"{where}.{setting}={value}" if value else where
            found.append(f'{what}: needs the package {module}; pip install "kdcli[augment]"')
    return found


def _chosen(given: Any, value: str | None) -> bool:
    if value is None or given == value:
        return True
    return isinstance(given, Collection) and not isinstance(given, str) and value in given
