"""What follows a verb: Hydra's overrides, and its flags in any place among them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from kdcli.config import secrets
from kdcli.config.nearest import nearest
from kdcli.errors import ConfigError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog}: {message}; `{self.prog} --help` lists the flags")


def parser(verb: str) -> argparse.ArgumentParser:
    """The flags of Hydra that kdcli passes on. The rest of them would load a pickle or another program's config."""
    flags = _Parser(
        prog=f"kdcli {verb}", add_help=False, allow_abbrev=False, formatter_class=argparse.RawTextHelpFormatter
    )
    flags.add_argument("overrides", nargs="*", help=argparse.SUPPRESS)
    flags.add_argument("-h", "--help", action="store_true", help="this page")
    flags.add_argument(
        "-m", "--multirun", action="store_true", help="sweep: every combination of values given as a,b,c"
    )
    flags.add_argument(
        "-c",
        "--cfg",
        choices=["job", "hydra", "all"],
        metavar="PART",
        help="print the composed config (job, hydra or all) and stop",
    )
    flags.add_argument("-p", "--package", metavar="KEY", help="with --cfg: only this part, such as objective.kd")
    flags.add_argument("--resolve", action="store_true", help="with --cfg: fill in interpolations")
    flags.add_argument("-cd", "--config-dir", metavar="DIR", help="one more folder of config groups (and recipe/)")
    flags.add_argument(
        "-i",
        "--info",
        choices=["all", "config", "defaults", "defaults-tree", "plugins", "searchpath"],
        metavar="WHAT",
        help="what Hydra knows: all, config, defaults, defaults-tree, plugins, searchpath",
    )
    if verb == "augment":
        flags.add_argument(
            "--dry-run",
            action="store_true",
            help="print calls, tokens, cost and terms; ask nothing, write nothing",
        )
        flags.add_argument("--stats", metavar="STORE", help="what a store of answers holds, and stop")
        flags.add_argument("--purge", metavar="STORE", help="delete stored answers, with --older-than DAYS, and stop")
        flags.add_argument("--older-than", metavar="DAYS", help="with --purge: how old they are at least")
    return flags


def parse(verb: str, argv: Sequence[str]) -> argparse.Namespace:
    """Flags and overrides. Raises ConfigError for an unknown flag, a literal secret, or a word without `=`.

    `recipe=NAME` is taken as `+recipe=NAME`, and `recipe=FILE.yaml` as the recipe in that file.
    """
    problems = secrets.in_arguments(argv)
    if problems:
        raise ConfigError(*problems)
    flags = parser(verb)
    known, unknown = flags.parse_known_intermixed_args(list(argv))
    if unknown:
        valid = [option for action in flags._actions for option in action.option_strings]
        match = nearest(unknown[0], valid)
        hint = f"did you mean {match}?" if match else f"`kdcli {verb} --help` lists the flags"
        raise ConfigError(f"{unknown[0]}: kdcli {verb} has no such flag; {hint}")
    known.recipe_folders = []
    known.overrides = [_recipe(one, known.recipe_folders) for one in known.overrides]
    for one in known.overrides:
        if "=" not in one and not one.startswith("~"):
            raise ConfigError(_bare_word(verb, one))
    return known


def _recipe(override: str, folders: list[Path]) -> str:
    key, equals, value = override.partition("=")
    if key not in ("recipe", "+recipe") or not equals:
        return override
    if value.endswith((".yaml", ".yml")) and "," not in value:
        file = Path(value).expanduser()
        if not file.is_file():
            raise ConfigError(f"+recipe={value}: there is no file {file.absolute()}; `kdcli ls` lists the recipes")
        folders.append(file.resolve().parent)
        value = file.stem
    return f"+recipe={value}"


def _bare_word(verb: str, word: str) -> str:
    from kdcli.command.catalog import recipe_names

    if word in recipe_names():
        return f"{word}: is a recipe; write `kdcli {verb} +recipe={word}`"
    match = nearest(word, recipe_names())
    hint = f"did you mean +recipe={match}?" if match else "write KEY=VALUE or +recipe=NAME"
    return f"{word}: is neither a flag nor KEY=VALUE; {hint}"
