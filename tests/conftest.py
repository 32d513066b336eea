"""What all tests share: no network, no GPU unless asked for, and `kdcli` called in an empty folder."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import pytest

hypothesis.settings.register_profile("kdcli", deadline=None)  # a busy machine is slow, and that is no mistake
hypothesis.settings.load_profile("kdcli")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line sets it; here torch may be loaded first
os.environ["KDCLI_TESTING"] = "1"
for name in ("KDCLI_PLUGINS", "KDCLI_FAULT", "KDCLI_TRACEBACK"):
    os.environ.pop(name, None)

REPOSITORY = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Result:
    """How a command ended, and what it wrote."""

    code: int
    out: str
    err: str


@pytest.fixture
def kdcli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """`kdcli("distill", "+recipe=tiny")` in this process, with an empty current folder."""
    from kdcli.cli import main

    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Result:
        capfd.readouterr()
        monkeypatch.setattr("sys.argv", ["kdcli", *arguments])
        code = main(list(arguments))
        captured = capfd.readouterr()
        return Result(code, captured.out, captured.err)

    return run


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu need one."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked:
        import torch

        if not torch.cuda.is_available():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))
