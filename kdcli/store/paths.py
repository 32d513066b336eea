"""Where things lie: the packaged configs and recipes, the cache, and what a path in a config means."""

from __future__ import annotations

import os
from importlib import metadata
from pathlib import Path

from kdcli.errors import ConfigError

PACKAGE = Path(__file__).resolve().parents[1]
RECIPES = "recipes://"
PACKAGED = "package://"


def configs() -> Path:
    """The config groups: `kdcli/_configs` in a wheel, `configs` in a checkout."""
    return _shipped("configs")


def recipes() -> Path:
    """The recipes and the data they use: `kdcli/_recipes` in a wheel, `recipes` in a checkout."""
    return _shipped("recipes")


def cache() -> Path:
    """Where converted models and tokenized data are kept: $KDCLI_CACHE, or kdcli in the user's cache folder.

    Created for the user alone (0700). Raises ConfigError where it cannot be written.
    """
    base = os.environ.get("KDCLI_CACHE")
    folder = Path(base).expanduser() if base else _user_cache() / "kdcli"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:
        raise ConfigError(
            f"the cache folder {folder} cannot be made ({error}); set KDCLI_CACHE to a folder you may write"
        ) from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"the cache folder {folder} is read-only; set KDCLI_CACHE to a folder you may write")
    return folder


def resolve(path: str) -> Path:
    """The file or folder that a path in a config means.

    `recipes://data/mini` lies among the recipes, `package://DISTRIBUTION/FILE` in an installed distribution,
    anything else in the file system. Raises ConfigError where a recipes:// or package:// path names nothing.
    """
    if path.startswith(RECIPES):
        return _recipe_file(path)
    if path.startswith(PACKAGED):
        return _distribution_file(path)
    return Path(path).expanduser()


def _shipped(name: str) -> Path:
    packaged = PACKAGE / f"_{name}"
    return packaged if packaged.is_dir() else PACKAGE.parent / name


def _user_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return Path(base) if base and Path(base).is_absolute() else Path.home() / ".cache"


def _recipe_file(path: str) -> Path:
    root = recipes().resolve()
    found = (root / path.removeprefix(RECIPES)).resolve()
    if not found.is_relative_to(root):
        raise ConfigError(f"{path}: leads out of the recipes folder; write a plain path instead")
    if not found.exists():
        raise ConfigError(f"{path}: there is no such file or folder in {root}; `kdcli ls` lists what is there")
    return found


def _distribution_file(path: str) -> Path:
    distribution, _, name = path.removeprefix(PACKAGED).partition("/")
    if not distribution or not name:
        raise ConfigError(f"{path}: write package://DISTRIBUTION/FILE")
    try:
        files = metadata.files(distribution) or []
    except metadata.PackageNotFoundError:
        raise ConfigError(
            f"{path}: the package {distribution} is not installed; run `pip install --no-deps {distribution}`"
        ) from None
    for file in files:
        if str(file) == name or file.name == name:
            return Path(str(file.locate()))
    raise ConfigError(f"{path}: the package {distribution} has no file {name}; see `pip show -f {distribution}`")
