"""`${oc.env:NAME}` in a config: a reference that stays one on disk, and is read where the value is used."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from kdcli.errors import ConfigError

VARIABLE = re.compile(r"\$\{oc\.env:([A-Za-z_]\w*)(?:,([^{}]*))?\}")


def expand(value: Any) -> Any:
    """`value` with every `${oc.env:NAME}` or `${oc.env:NAME,default}` replaced, inside mappings and lists too.

    Raises ConfigError for a variable that is not set and has no default.
    """
    if isinstance(value, str):
        return VARIABLE.sub(_value, value)
    if isinstance(value, Mapping):
        return {key: expand(item) for key, item in value.items()}
    return [expand(item) for item in value] if isinstance(value, Sequence) else value


def _value(match: re.Match[str]) -> str:
    name, default = match.groups()
    value = os.environ.get(name, default)
    if value is None:
        raise ConfigError(f"${{oc.env:{name}}}: the environment variable {name} is not set; export {name}=…")
    return value.strip()
