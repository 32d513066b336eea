"""`kdcli cache`: write what a teacher says of a data set; `--stats STORE`, `--verify STORE`: see what is there."""

from __future__ import annotations

from collections.abc import Sequence

from kdcli.command import hydra_verb
from kdcli.errors import ConfigError

FLAGS = ("--stats", "--verify")


def main(argv: Sequence[str]) -> int:
    """Do what the overrides or the flag say; returns the exit code."""
    arguments = list(argv)
    for flag in FLAGS:
        given = next((one for one in arguments if one == flag or one.startswith(f"{flag}=")), None)
        if given is not None:
            return _look(flag, given, arguments)
    return hydra_verb.main("cache", arguments)


def _look(flag: str, given: str, arguments: list[str]) -> int:
    from kdcli.command import cache_stats  # here, because it imports torch

    place = arguments.index(given)
    path = given.partition("=")[2]
    rest = arguments[:place] + arguments[place + 1 :]
    if not path and place < len(arguments) - 1:
        path = arguments[place + 1]
        rest = arguments[:place] + arguments[place + 2 :]
    if not path:
        raise ConfigError(f"{flag}: which store? write `kdcli cache {flag} PATH`")
    return cache_stats.verify(path) if flag == "--verify" else cache_stats.show(path, rest)
