"""Recipes, groups and options, each with the one line that its YAML file begins with. No Hydra, no torch."""

from __future__ import annotations

from pathlib import Path

from kdcli.config.schema import COMPONENTS, THIRD_PARTY
from kdcli.store import paths

GROUPS = (*COMPONENTS, *THIRD_PARTY)
CHOICES = (*GROUPS, "control")  # and what a run is compared with
PROMPT = "prompt"  # files that steps of an augmentation name, and no group that is chosen from


def first_comment(file: Path) -> str:
    """The comment in a YAML file's first line, or an empty text."""
    with file.open(encoding="utf-8") as lines:
        line = lines.readline().strip()
    return line.lstrip("# ").strip() if line.startswith("#") else ""


def recipes() -> dict[str, Path]:
    """Recipe name -> file; the user's own ./recipes come first."""
    return _yaml_files([Path("recipes"), paths.recipes()])


def options(group: str) -> dict[str, Path]:
    """Option name -> file of a config group; the user's own ./configs come first."""
    return _yaml_files([Path("configs") / group, paths.configs() / group])


def recipe_names() -> list[str]:
    """What `+recipe=` takes."""
    return list(recipes())


def _yaml_files(folders: list[Path]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for folder in folders:
        for file in sorted(folder.rglob("*.yaml")) if folder.is_dir() else []:
            found.setdefault(file.relative_to(folder).with_suffix("").as_posix(), file)
    return dict(sorted(found.items()))
