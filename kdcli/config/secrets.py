"""Secrets stay out of configs: a config holds the NAME of an environment variable, never a key's value."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

VALUE = re.compile(
    r"(?<![A-Za-z0-9])(sk-[A-Za-z0-9_-]{16,}|hf_[A-Za-z0-9]{16,}|AKIA[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{20,}"
    r"|github_pat_\w{20,}|glpat-[\w-]{16,}|xox[abpr]-[\w-]{10,})"
    r"|://[^/\s:@]+:[^/\s@]+@"
)
NAME = re.compile(r"(^|_)(api_?key|access_?key|key|token|secret|password|passwd|credentials?)$", re.IGNORECASE)
TOKEN_OF_A_VOCABULARY = re.compile(r"(bos|eos|pad|unk|sep|cls|mask|stop|image|special)_token$", re.IGNORECASE)
HARMLESS = re.compile(r"(|null|none|true|false|\?\?\?|[-+.\d]+|\$\{oc\.env:.*\})$", re.IGNORECASE)


def in_arguments(arguments: Iterable[str]) -> list[str]:
    """One problem per command-line override that holds a literal secret; the value is not repeated."""
    problems = []
    for argument in arguments:
        key, _, value = argument.lstrip("+~").partition("=")
        if _is_secret(key, value) or VALUE.search(argument):
            problems.append(_problem(key if "=" in argument else argument[:4] + "…"))
    return problems


def in_config(node: Any, where: str = "") -> list[str]:
    """One problem per value of a config tree that is a literal secret; the value is not repeated."""
    if isinstance(node, Mapping):
        return [p for key, value in node.items() for p in in_config(value, f"{where}.{key}" if where else str(key))]
    if isinstance(node, Sequence) and not isinstance(node, str | bytes):
        return [p for i, value in enumerate(node) for p in in_config(value, f"{where}.{i}")]
    if isinstance(node, str) and _is_secret(where, node):
        return [_problem(where)]
    return []


def _is_secret(key: str, value: str) -> bool:
    name = key.rsplit(".", 1)[-1]
    value = value.strip("'\" ")
    named = NAME.search(name) and not TOKEN_OF_A_VOCABULARY.search(name) and not HARMLESS.match(value)
    return bool(named or VALUE.search(value))


def _problem(where: str) -> str:
    name = re.sub(r"\W", "_", where.rsplit(".", 1)[-1]).upper()
    if name.endswith("_ENV"):
        return (
            f"{where}: holds a secret as a literal value; put it into an environment variable and write the "
            f"variable's name here, such as {where}=TEACHER_API_KEY, then revoke the key if it was shared"
        )
    return (
        f"{where}: holds a secret as a literal value; put it into an environment variable and write "
        f"{where}='${{oc.env:{name}}}' (only the name is written to disk), then revoke the key if it was shared"
    )
