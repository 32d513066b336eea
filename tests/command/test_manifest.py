"""What a manifest says of licences."""

from __future__ import annotations

from pathlib import Path

import pytest

from kdcli.command.manifest import licence


def test_the_packaged_data_points_to_its_licences() -> None:
    assert licence("recipes://data/mini/train") == "see LICENSES.md in data"


def test_a_package_states_its_own() -> None:
    assert licence("package://pytest/entry_points.txt") == "MIT"


def test_a_model_card_states_it(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    assert licence(str(tmp_path)) == "apache-2.0"


def test_a_licence_of_something_else_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "LICENSE").write_text("of the project one stands in")
    monkeypatch.chdir(tmp_path)
    assert licence("gpt2") == "unknown"
