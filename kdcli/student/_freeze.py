"""Which of a model's parameters learn, by patterns over their names."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from kdcli.errors import ConfigError


def choose(model: Any, train: Sequence[str], freeze: Sequence[str], *, only: bool = True) -> None:
    """Let the parameters that `train` names learn (and no others, if `only`), then freeze those that `freeze` names.

    A pattern is a shell's (`model.layers.[0-3].*`, where `*` crosses dots) or, after `re:`, a regular expression; it
    stands for whole names. Tied weights are one parameter with two names: what holds for one holds for the other.
    Raises ConfigError for a pattern that names nothing, and where nothing is left to learn.
    """
    if not train and not freeze:
        return
    names = [(_plain(name), parameter) for name, parameter in model.named_parameters(remove_duplicate=False)]
    if train:
        chosen = _matched("student.train", train, names)
        for _, parameter in names:
            parameter.requires_grad_(id(parameter) in chosen or (not only and parameter.requires_grad))
    frozen = _matched("student.freeze", freeze, names)
    for _, parameter in names:
        if id(parameter) in frozen:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for _, parameter in names):
        raise ConfigError("student.freeze: nothing is left that may learn; leave out a pattern")


def _matched(where: str, patterns: Sequence[str], names: Sequence[tuple[str, Any]]) -> set[int]:
    """Which parameters the patterns name, by identity."""
    found: set[int] = set()
    for pattern in patterns:
        hits = {id(parameter) for name, parameter in names if _fits(where, pattern, name)}
        if not hits:
            raise ConfigError(f"{where}: {pattern} names no parameter; {_near(pattern, [name for name, _ in names])}")
        found |= hits
    return found


def _fits(where: str, pattern: str, name: str) -> bool:
    if not pattern.startswith("re:"):
        return fnmatchcase(name, pattern)
    try:
        return re.fullmatch(pattern.removeprefix("re:"), name) is not None
    except re.error as error:
        raise ConfigError(f"{where}: {pattern} is no regular expression ({error})") from None


def _plain(name: str) -> str:
    """A parameter's name as it is without an adapter around its layer."""
    return name.replace(".base_layer.", ".")


def _near(pattern: str, names: Sequence[str]) -> str:
    """The names most like the pattern, or else how names look."""
    word = pattern.removeprefix("re:").replace("*", "")
    inner = {name for name in names if word and word.strip(".") in name}
    close = sorted(inner)[:3] or difflib.get_close_matches(pattern, names, n=3, cutoff=0.5)
    if close:
        return f"near are {', '.join(close)}" if len(close) > 1 else f"did you mean {close[0]}?"
    return f"names look like {', '.join([names[0], names[len(names) // 2], names[-1]])}"
