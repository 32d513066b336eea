"""Tab completion: the verb here, what follows it from Hydra or from the lists of recipes and groups."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

from kdcli.command.catalog import CHOICES, GROUPS, PROMPT, options, recipe_names
from kdcli.errors import ConfigError


def main(argv: Sequence[str], verbs: Iterable[str], composed: Iterable[str]) -> int:
    """`install=SHELL` and `uninstall=SHELL` print a script to eval; `query=SHELL` prints words for $COMP_LINE."""
    action, _, shell = (argv[0] if argv else "").partition("=")
    if action not in ("install", "uninstall", "query") or shell not in ("bash", "zsh", "fish"):
        raise ConfigError('kdcli -sc: write eval "$(kdcli -sc install=bash)"; the shells are bash, zsh and fish')
    if action != "query":
        from kdcli.command.compose import hydra

        with hydra() as app:
            app.shell_completion(config_name=None, overrides=[f"{action}={shell}"])
        return 0
    words = os.environ.get("COMP_LINE", "").split(" ")[1:]
    if len(words) <= 1:
        print(" ".join(verbs))
    elif words[0] in composed and (found := _options_of_a_term(words[-1])):
        print(" ".join(found))
    elif words[0] in composed:
        from kdcli.command.hydra_verb import complete

        return complete(words[0], " ".join(words[1:]), shell)
    elif words[0] == "ls":
        print(" ".join(("recipe", PROMPT, *CHOICES)))
    elif words[0] == "copy" and len(words) == 2:
        print(" ".join(recipe_names()))
    return 0


def _options_of_a_term(word: str) -> list[str]:
    """The options of a named term, `objective@objective.kd=…`, which Hydra does not complete."""
    place, equals, _ = word.partition("=")
    group, at, _ = place.lstrip("+").partition("@")
    return [f"{place}={option}" for option in options(group)] if at and equals and group in GROUPS else []
