"""DESIGN 4: a module imports only from the layers below it. The contracts stand in pyproject.toml."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY


def contracts(folder: Path) -> subprocess.CompletedProcess[str]:
    script = "import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())"
    return subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, check=False)


def test_every_contract_is_kept() -> None:
    pytest.importorskip("importlinter")
    done = contracts(REPOSITORY)
    assert done.returncode == 0, done.stdout
    assert ", 0 broken" in done.stdout


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("ops/head.py", "import kdcli.train.loop", "layers"),
        ("teacher/none.py", "import kdcli.student.hf", "layers"),
        ("newcomer.py", "", "layers"),
        ("train/loop.py", "import deepspeed", "deepspeed"),
        ("worker.py", "import omegaconf", "hydra"),
    ],
)
def test_a_breach_is_seen(tmp_path: Path, module: str, line: str, contract: str) -> None:
    """The contracts bite: each copy of the package has one forbidden import, or a module in no layer."""
    pytest.importorskip("importlinter")
    shutil.copytree(REPOSITORY / "kdcli", tmp_path / "kdcli", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    file = tmp_path / "kdcli" / module
    file.write_text((file.read_text() if file.exists() else '"""New."""\n') + f"\n{line}\n")
    done = contracts(tmp_path)
    names = {
        c["id"]: c["name"]
        for c in tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    }
    assert done.returncode != 0
    assert f"{names[contract]} BROKEN" in done.stdout, done.stdout
