"""A launcher that trains nothing, so that commands can be tested without models: a plugin, as users write them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

PLUGIN = '''
"""Pretends to run: writes the metrics and the status that a worker would."""

from pathlib import Path

import yaml

from kdcli.api import Launcher
from kdcli.store import status
from kdcli.store.metrics import MetricsLog


class Pretend(Launcher):
    def __init__(self, *, processes: int = 1, fail_at_lr: float | None = None, exit_code: int = 4) -> None:
        self.processes = processes
        self.fail_at_lr = fail_at_lr
        self.exit_code = exit_code

    def __call__(self, run_dir: Path, *, isolate: bool = False) -> int:
        config = yaml.safe_load((run_dir / "config.yaml").read_text())
        steps, lr = config["run"].get("steps", 0), config.get("optimizer", {}).get("lr", 0)
        with open(run_dir.parent / "launched", "a") as file:
            file.write(f"{run_dir.name} {isolate}\\n")
        if lr == self.fail_at_lr:
            facts = {"step": 1, "steps": steps, "resumable": False, "exit_code": self.exit_code}
            status.write(run_dir, "failed", **facts, reason="NaN at step 1")
            return self.exit_code
        log = MetricsLog(run_dir)
        log.append(steps, {"loss/total": lr * 2, "eval/heldout/all/kl": lr})
        (run_dir / "checkpoints" / f"step-{steps:06d}").mkdir(parents=True, exist_ok=True)
        status.write(run_dir, "done", step=steps, steps=steps, resumable=True, exit_code=0)
        return 0
'''

DISTILL = ["launch=pretend", "teacher.path=recipes://data/tiny_teacher", "data.path=recipes://data/mini/valid"]


@pytest.fixture
def pretend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Overrides of a complete distillation whose launcher only pretends; the current folder must be tmp_path."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("KDCLI_PLUGINS", "pretend_launcher")
    (tmp_path / "pretend_launcher.py").write_text(PLUGIN)
    (tmp_path / "configs/launch").mkdir(parents=True)
    (tmp_path / "configs/launch/pretend.yaml").write_text(
        "# Pretends\n_target_: pretend_launcher.Pretend\nprocesses: 1\nfail_at_lr: null\nexit_code: 4\n"
    )
    init = ["student_init=from_config", "student_init.config=recipes://data/tiny_teacher"]
    return [*DISTILL, *init, "run.steps=2"]
