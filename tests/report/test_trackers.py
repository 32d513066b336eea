"""Trackers get the numbers and the config without secrets; each is tried with its library if that is installed."""

import json
import sqlite3
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from kdcli.api import Reporter
from kdcli.errors import ConfigError
from kdcli.report import _tracked
from kdcli.report.mlflow import MLflow
from kdcli.report.tensorboard import TensorBoard
from kdcli.report.trackio import Trackio
from kdcli.report.wandb import WandB

KEY = "sk-" + "a1" * 12
CONFIG = {
    "run": {"seed": 3},
    "teacher": {"path": "x", "api_key": "letmein", "api_key_env": "MY_KEY", "token": "${oc.env:MY_TOKEN}"},
    "notes": [f"use {KEY}"],
}
METRICS = {"loss/total": 2.5, "eval/heldout/code/ppl": 12.0, "lr": 0.001}


def needs(module: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(find_spec(module) is None, reason=f"{module} is not installed")


def _run(reporter: Reporter, folder: Path, *, first: int = 1, last: int = 3) -> None:
    """Steps `first` to `last`, the loss falling by one per step, and a number there is none of."""
    reporter.start({"dir": folder, "name": "try", "steps": 5, "step": first - 1, "config": CONFIG})
    for step in range(first, last + 1):
        reporter.log(step, METRICS | {"loss/total": 10.0 - step, "grad_norm": float("nan")})
    reporter.close()


def _read_everything(folder: Path) -> bytes:
    return b"".join(file.read_bytes() for file in folder.rglob("*") if file.is_file())


def test_secrets_are_not_shown() -> None:
    shown = _tracked.shown(CONFIG)
    assert KEY not in json.dumps(shown)
    assert shown["teacher"] == CONFIG["teacher"] | {"api_key": "***"}
    assert shown["run"] == {"seed": 3}


def test_the_value_of_a_secret_variable_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "hidden-value")
    assert _tracked.shown({"notes": "it is hidden-value"}) == {"notes": "it is ***"}


def test_only_finite_numbers_leave() -> None:
    given: dict[str, Any] = {"a": 1, "b": 0.5, "c": float("nan"), "d": float("inf"), "e": "text", "f": None}
    assert _tracked.numbers(given) == {"a": 1.0, "b": 0.5}


def test_configs_are_flattened_with_dots() -> None:
    assert _tracked.flat({"a": {"b": 1, "c": {"d": [2]}}, "e": None}) == {"a.b": 1, "a.c.d": [2], "e": None}


def test_a_run_that_goes_on_keeps_its_identity(tmp_path: Path) -> None:
    first = _tracked.identity(tmp_path, "wandb")
    assert _tracked.identity(tmp_path, "wandb") == first
    assert _tracked.identity(tmp_path, "mlflow") != first


@pytest.mark.parametrize("reporter", [TensorBoard, WandB, MLflow, Trackio])
def test_a_missing_library_is_named_before_anything_starts(reporter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tracked.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'pip install "kdcli\[track\]"'):
        reporter()


@pytest.mark.parametrize("module", ["tensorboard", "wandb", "mlflow", "trackio"])
def test_closing_what_never_started_is_harmless(module: str) -> None:
    if find_spec(module) is None:
        pytest.skip(f"{module} is not installed")
    {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow, "trackio": Trackio}[module]().close()


@needs("tensorboard")
def test_tensorboard_holds_each_step_once_after_a_resume(tmp_path: Path) -> None:
    """The first process wrote steps 1 to 3, its checkpoint was of step 2, the second goes on with 3."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _run(TensorBoard(), tmp_path)
    _run(TensorBoard(), tmp_path, first=3, last=4)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss/total")] == [(1, 9), (2, 8), (3, 7), (4, 6)]
    assert events.Scalars("eval/heldout/code/ppl")[0].value == 12
    assert "grad_norm" not in events.Tags()["scalars"]
    assert KEY.encode() not in _read_everything(tmp_path)


@needs("wandb")
def test_wandb_offline_run_has_numbers_and_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    _run(WandB(mode="offline", tags=["a"]), tmp_path)
    content = _read_everything(tmp_path / "wandb")
    assert b"eval/heldout/code/ppl" in content
    assert KEY.encode() not in content
    assert b"letmein" not in content


@needs("mlflow")
def test_mlflow_holds_metrics_and_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = (tmp_path / "store").as_uri()
    _run(MLflow(experiment="e", uri=uri), tmp_path)
    _run(MLflow(experiment="e", uri=uri), tmp_path, first=4, last=5)
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("e")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert [m.step for m in client.get_metric_history(run.info.run_id, "loss/total")] == [1, 2, 3, 4, 5]
    assert run.data.metrics["loss/total"] == 5
    assert run.data.params["run.seed"] == "3"
    assert run.data.params["teacher.api_key"] == "***"


@needs("trackio")
def test_trackio_holds_metrics_and_no_secret(tmp_path: Path) -> None:
    """In a process of its own: trackio reads its folder from the environment when it is imported."""
    import subprocess
    import sys

    code = (
        "from pathlib import Path; from tests.report.test_trackers import _run, Trackio;"
        f"folder = Path({str(tmp_path)!r}); _run(Trackio(project='p'), folder);"
        "_run(Trackio(project='p'), folder, first=4, last=5)"
    )
    environment = {
        "TRACKIO_DIR": str(tmp_path / "store"),
        "PYTHONPATH": ".",
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
    }
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    (database,) = (tmp_path / "store").glob("*.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("select step, metrics from metrics order by step").fetchall()
        assert len(connection.execute("select distinct run_name from metrics").fetchall()) == 1
    assert [step for step, _ in rows] == [1, 2, 3, 4, 5]
    assert json.loads(rows[0][1])["loss/total"] == 9
    assert KEY.encode() not in _read_everything(tmp_path / "store")
