"""Checks of the settings that data options share."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping

from kdcli.errors import ConfigError
from kdcli.store.examples import FIELDS


def check_columns(columns: Mapping[str, str] | None) -> dict[str, str]:
    """Our field -> the data's column. Raises ConfigError for a field that an example does not have."""
    for name in columns or {}:
        if name not in FIELDS:
            near = difflib.get_close_matches(name, FIELDS, n=1)
            hint = f"did you mean data.columns.{near[0]}?" if near else f"fields are {', '.join(FIELDS)}"
            raise ConfigError(f"data.columns.{name}: an example has no such field; {hint}")
    return dict(columns or {})


def check_limit(limit: int | None) -> int | None:
    """Raises ConfigError unless the limit is null or at least 1."""
    if limit is not None and limit < 1:
        raise ConfigError(f"data.limit is {limit}; give a number of rows from 1, or null for all")
    return limit


def check_domains(names: Iterable[str], source: str) -> None:
    """Raises ConfigError for a name that could not be part of a metric's path or a file's name."""
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name):
            raise ConfigError(
                f"{source}: {name!r} cannot name a domain; use letters, digits, . _ -, or set data.domain"
            )
