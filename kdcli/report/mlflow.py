"""MLflow, through its library: numbers as metrics, the config as parameters."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from kdcli.api import Reporter
from kdcli.report._tracked import flat, identity, library, numbers, require, shown

BATCH = 100  # parameters per request: MLflow's limit
LONGEST = 6000  # characters of a parameter: MLflow's limit


class MLflow(Reporter):
    """`uri` is a tracking server, or a local store such as `sqlite:///mlflow.db`; null: MLFLOW_TRACKING_URI, or
    what MLflow does by itself. Raises ConfigError if mlflow is not installed."""

    def __init__(self, *, experiment: str = "kdcli", uri: str | None = None) -> None:
        require("mlflow", "mlflow")
        self.experiment = experiment
        self.uri = uri
        self._client: Any = None
        self._run = ""

    def start(self, info: Mapping[str, Any]) -> None:
        self._client = library("mlflow").MlflowClient(tracking_uri=self.uri)

        def create() -> str:
            known = self._client.get_experiment_by_name(self.experiment)
            experiment = known.experiment_id if known else self._client.create_experiment(self.experiment)
            run = self._client.create_run(experiment, run_name=info["name"]).info.run_id
            param = library("mlflow.entities").Param
            params = [param(key, str(value)[:LONGEST]) for key, value in flat(shown(info["config"])).items()]
            for start in range(0, len(params), BATCH):
                self._client.log_batch(run, params=params[start : start + BATCH])
            return run

        self._run = identity(info["dir"], "mlflow", create)
        self._client.update_run(self._run, status="RUNNING")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        metric, now = library("mlflow.entities").Metric, int(time.time() * 1000)
        self._client.log_batch(self._run, metrics=[metric(k, v, now, step) for k, v in numbers(metrics).items()])

    def close(self) -> None:
        if self._run:
            self._client.set_terminated(self._run)
