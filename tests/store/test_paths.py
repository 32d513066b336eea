"""What a path in a config means."""

from __future__ import annotations

from pathlib import Path

import pytest

from kdcli.errors import ConfigError
from kdcli.store import paths


def test_recipes_paths_lie_among_the_recipes() -> None:
    assert paths.resolve("recipes://data/mini/train") == paths.recipes() / "data/mini/train"


@pytest.mark.parametrize("path", ["recipes://../pyproject.toml", "recipes:///etc/passwd", "recipes://data/../../kdcli"])
def test_recipes_paths_do_not_lead_out(path: str) -> None:
    with pytest.raises(ConfigError, match="leads out of the recipes folder"):
        paths.resolve(path)


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("recipes://data/nothing", "no such file or folder"),
        ("package://kdcli-no-such/file", r"run `pip install --no-deps kdcli-no-such`"),
        ("package://pytest/no-such-file", "has no file no-such-file"),
        ("package://pytest", "write package://DISTRIBUTION/FILE"),
    ],
)
def test_a_path_that_names_nothing_says_what_to_do(path: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        paths.resolve(path)


def test_package_paths_find_a_file_by_its_name_or_place() -> None:
    assert paths.resolve("package://pytest/entry_points.txt").is_file()
    assert paths.resolve("package://pytest/_pytest/main.py").name == "main.py"


def test_the_cache_follows_the_environment_and_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDCLI_CACHE", str(tmp_path / "a"))
    assert paths.cache() == tmp_path / "a"
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o700
    monkeypatch.delenv("KDCLI_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert paths.cache() == tmp_path / "xdg/kdcli"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # the standard says: ignore it
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert paths.cache() == tmp_path / "home/.cache/kdcli"


def test_a_cache_that_cannot_be_made_names_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KDCLI_CACHE", str(tmp_path / "file/cache"))
    with pytest.raises(ConfigError, match="set KDCLI_CACHE"):
        paths.cache()
