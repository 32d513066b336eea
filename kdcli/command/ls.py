"""`kdcli ls [recipe | GROUP | prompt]`: what there is to choose from, one line each."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from kdcli.command.catalog import CHOICES, PROMPT, first_comment, options, recipes
from kdcli.config.nearest import suggest
from kdcli.errors import ConfigError

USAGE = """usage: kdcli ls [recipe | GROUP | prompt]

Lists recipes, config groups and the prompts of augmentation's steps; with a name, the recipes, that group's options or
the prompts, each with what choosing it gives.
"""


ADDED = {"augmentation": "NAME=STEP", "writer": "teacher=NAME"}  # of which there is none to replace
PROMPTS = "prompt: augmentation.NAME.prompt=PROMPT"


def main(argv: Sequence[str]) -> int:
    """Print the list. Raises ConfigError for a group that does not exist."""
    if "-h" in argv or "--help" in argv:
        print(USAGE, end="")
        return 0
    if len(argv) > 1:
        raise ConfigError(f"kdcli ls takes one name, not {len(argv)}: {USAGE.splitlines()[0]}")
    wanted = argv[0].rstrip("/") if argv else None
    if wanted is None:
        _show("Recipes: kdcli distill +recipe=NAME", _recipe_rows())
        for group in CHOICES:
            _show(f"{group}: {_how(group)}", _option_rows(group))
        _show(PROMPTS, _option_rows(PROMPT))
    elif wanted in (PROMPT, "prompts"):
        _show(PROMPTS, _option_rows(PROMPT))
    elif wanted in ("recipe", "recipes"):
        _show("Recipes: kdcli distill +recipe=NAME", _recipe_rows())
    elif wanted in CHOICES:
        _show(f"{wanted}: {_how(wanted)}", _option_rows(wanted))
    else:
        raise ConfigError(
            f"kdcli ls {wanted}: there is no such group; {suggest(wanted, ['recipe', PROMPT, *CHOICES], limit=20)}"
        )
    return 0


def _how(group: str) -> str:
    if group in ADDED:
        return f"+{group}@{group}.{ADDED[group]}"
    names = {"objective": "kd", "evaluation": "heldout", "report": "console"}
    return f"{group}@{group}.{names[group]}=NAME" if group in names else f"{group}=NAME"


def _recipe_rows() -> list[tuple[str, str]]:
    return [(name, first_comment(file)) for name, file in recipes().items()]


def _option_rows(group: str) -> list[tuple[str, str]]:
    return [(name, first_comment(file)) for name, file in options(group).items()]


def _show(title: str, rows: list[tuple[str, str]]) -> None:
    if not rows:
        return
    if not sys.stdout.isatty():
        width = max(len(name) for name, _ in rows)
        print(f"{title}\n" + "\n".join(f"  {name.ljust(width)}  {text}".rstrip() for name, text in rows))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=None, show_header=False, padding=(0, 1))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column()
    for name, text in rows:
        table.add_row(name, text)
    Console(highlight=False).print(table)
