"""`kdcli ls` and `kdcli copy`."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from kdcli.command.catalog import GROUPS, options, recipes


def test_ls_shows_every_option_with_its_line(kdcli) -> None:
    out = kdcli("ls").out
    for group in GROUPS:
        assert f"\n{group}: " in out or out.startswith(f"{group}: ")
        for name in options(group):
            assert any(line.split()[:1] == [name] and len(line.split()) > 1 for line in out.splitlines())


def test_ones_own_recipes_and_options_are_listed_first_and_shadow(kdcli, tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/tiny.yaml").write_text("# Mine\nrun: {name: mine}\n")
    (tmp_path / "configs/teacher").mkdir(parents=True)
    (tmp_path / "configs/teacher/mine.yaml").write_text("# My teacher\n_target_: kdcli.teacher.none.NoTeacher\n")
    out = kdcli("ls").out
    assert "Mine" in out
    assert "My teacher" in out
    assert yaml.safe_load(kdcli("distill", "+recipe=tiny", "--cfg", "job").out)["run"]["name"] == "mine"
    shown = kdcli("distill", "teacher=mine", "--cfg", "job", "-p", "teacher").out
    assert yaml.safe_load(shown) == {"_target_": "kdcli.teacher.none.NoTeacher"}


@pytest.mark.parametrize("recipe", sorted(recipes()))
@pytest.mark.parametrize("place", ["mine.yaml", "recipes/mine", "deep/er/mine.yaml"])
def test_a_copied_recipe_composes_to_the_same_config(kdcli, recipe: str, place: str) -> None:
    original = kdcli("distill", f"+recipe={recipe}", "--cfg", "job").out
    copied = kdcli("copy", recipe, place)
    assert copied.code == 0
    command = copied.out.split("run:  kdcli ")[1].split()
    assert kdcli(*command, "--cfg", "job").out == original


def test_copy_overwrites_nothing(kdcli, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("mine")
    result = kdcli("copy", "tiny", "mine.yaml")
    assert result.code == 2
    assert "exists and is not overwritten" in result.err
    assert (tmp_path / "mine.yaml").read_text() == "mine"


def test_prompts_are_listed_with_their_line(kdcli, tmp_path: Path) -> None:
    (tmp_path / "configs/prompt/label").mkdir(parents=True)
    (tmp_path / "configs/prompt/label/mine.yaml").write_text("# Asks my way\nuser: x\n")
    out = kdcli("ls", "prompt").out
    assert "  label/mine " in out and "Asks my way" in out and "  rollout/plain " in out
