"""A built wheel holds configs and recipes, and works from any folder."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("hatchling")
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(REPOSITORY)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(out / "site")
    return out / "site"


def run(site: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, cwd="/", check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_config_and_recipe_is_inside(unpacked: Path) -> None:
    for folder in ("configs", "recipes"):
        shipped = {f.relative_to(REPOSITORY / folder) for f in (REPOSITORY / folder).rglob("*") if f.is_file()}
        inside = {
            f.relative_to(unpacked / f"kdcli/_{folder}")
            for f in (unpacked / f"kdcli/_{folder}").rglob("*")
            if f.is_file()
        }
        assert inside == shipped
    assert not [file for file in unpacked.rglob("*") if "tests" in file.parts]


def test_it_works_from_the_root_folder(unpacked: Path) -> None:
    where = run(
        unpacked,
        "-c",
        "from kdcli.store import paths; print(paths.configs(), paths.resolve('recipes://data/mini/train'))",
    )
    assert all(place.startswith(str(unpacked)) for place in where.split())
    listed = run(unpacked, "-m", "kdcli", "ls")
    assert "quickstart" in listed
    assert "reverse_kl" in listed
    composed = run(unpacked, "-m", "kdcli", "distill", "+recipe=tiny", "--cfg", "job")
    assert "recipes://data/tiny_teacher" in composed
