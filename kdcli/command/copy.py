"""`kdcli copy RECIPE FILE`: a recipe of your own to edit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kdcli.command.catalog import recipes
from kdcli.config.nearest import suggest
from kdcli.errors import ConfigError

USAGE = """usage: kdcli copy RECIPE FILE

Writes a recipe to FILE (never over an existing one). Run it with `kdcli distill +recipe=FILE.yaml`,
or by its name when it lies in ./recipes.
"""


def main(argv: Sequence[str]) -> int:
    """Copy. Raises ConfigError for an unknown recipe, or a file that exists or cannot be written."""
    if "-h" in argv or "--help" in argv:
        print(USAGE, end="")
        return 0
    if len(argv) != 2:
        raise ConfigError(f"kdcli copy takes a recipe and a file; {USAGE.splitlines()[0]}")
    name, target = argv[0], Path(argv[1]).expanduser()
    known = recipes()
    if name not in known:
        raise ConfigError(f"{name}: there is no such recipe; {suggest(name, known)}")
    if target.is_dir() or argv[1].endswith("/"):
        target = target / f"{Path(name).name}.yaml"
    if target.suffix not in (".yaml", ".yml"):
        target = target.with_name(target.name + ".yaml")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("x", encoding="utf-8") as file:
            file.write(known[name].read_text(encoding="utf-8"))
    except FileExistsError:
        raise ConfigError(f"{target} exists and is not overwritten; give another name, or remove it first") from None
    except OSError as error:
        raise ConfigError(f"{target} cannot be written: {error.strerror}; give another place") from None
    print(f"{target} written. Edit it, then run:  kdcli distill +recipe={_run_as(target)}")
    return 0


def _run_as(target: Path) -> str:
    own = Path("recipes").resolve()
    inside = target.resolve()
    return inside.relative_to(own).with_suffix("").as_posix() if inside.is_relative_to(own) else str(target)
