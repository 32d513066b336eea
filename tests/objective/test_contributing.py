"""CONTRIBUTING's example of a loss, as it is printed there: two files, and the suite passes."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest

from kdcli.cli import main
from kdcli.command.catalog import options

PAGE = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")


def printed(suffix: str) -> tuple[Path, str]:
    """The path and the content of the file with this suffix under "Add a loss"."""
    section = PAGE.split("## Add a loss")[1].split("\n## ")[0]
    found = re.search(rf"`([\w/]+\.{suffix})`\n\n```\w+\n(.*?)```", section, re.DOTALL)
    assert found, f"CONTRIBUTING shows no {suffix} file"
    return Path(found[1]), found[2]


def test_the_example_does_not_exist_yet() -> None:
    assert printed("py")[0].stem == printed("yaml")[0].stem
    assert printed("py")[0].stem not in options("objective")


def test_two_files_make_a_loss_that_passes_the_suite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, code = printed("py")
    (tmp_path / path.name).write_text(code)
    spec = importlib.util.spec_from_file_location(f"kdcli.objective.{path.stem}", tmp_path / path.name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, f"kdcli.objective.{path.stem}", module)
    spec.loader.exec_module(module)
    config, content = printed("yaml")
    (tmp_path / config).parent.mkdir(parents=True)
    (tmp_path / config).write_text(content)
    monkeypatch.chdir(tmp_path)
    assert main(["verify", f"objective={path.stem}"]) == 0
    output = capsys.readouterr().out
    assert "all passed" in output
    for check in ("zero_at_teacher", "finite_differences", "top_k_bound", "micro_batches_do_not_matter", "loss_falls"):
        assert re.search(rf"{check} .* ok", output), output
