"""The export of a checkpoint: read from its shards, merged and written weight by weight, by one process and without
the run's models, data or teacher."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from kdcli.api import Engine
from kdcli.config.build import build
from kdcli.errors import ConfigError
from kdcli.store import blueprint
from kdcli.store.shards import dequantized
from kdcli.train import card, checkpoint
from kdcli.train.export import DTYPES, PREFIX, StudentFolder, write_weights
from kdcli.train.interrupt import Interrupt
from kdcli.worker.parts import change_status

log = logging.getLogger(__name__)


def work(folder: Path, config: Mapping[str, Any], interrupt: Interrupt) -> None:
    """Do what `config["export"]` says: {run, checkpoint, to, dtype}."""
    del interrupt
    asked = config["export"]
    run_dir, final = Path(asked["run"]), Path(asked["to"])
    trained = yaml.safe_load((run_dir / "config.yaml").read_text("utf-8"))
    found = checkpoint.verify(Path(asked["checkpoint"]))
    source = build(trained["engine"], Engine).saved(found.path / "engine")
    drawn = run_dir / blueprint.FOLDER
    plan, dtype = blueprint.read(drawn), DTYPES[asked["dtype"]]
    _require(source, plan, found.path)
    writer = StudentFolder(
        final,
        plan,
        dtype,
        lambda beside: blueprint.furnish(beside, drawn, dtype),
        blueprint.skeleton(drawn, plan.auto),
    )
    write_weights(plan, _reading(source), writer)
    writer.finish(card.text(run_dir, trained, final, plan.auto, found.step))
    if writer.problem is not None:
        raise writer.problem
    change_status(folder, "done", exit_code=0)
    print(f"student: {final} (step {found.step}, {asked['dtype']})\nnext:    {_next(final, trained)}", flush=True)


def _reading(source: Mapping[str, Callable[[], Tensor]]) -> Any:
    @contextmanager
    def read(names: Sequence[str]) -> Iterator[list[Tensor]]:
        yield [dequantized(f"{PREFIX}{name}", source) for name in names]

    return read


def _require(source: Mapping[str, Any], plan: blueprint.Blueprint, path: Path) -> None:
    """Raises ConfigError where the checkpoint is not of the student that the blueprint describes."""
    wanted = {name for weight in plan.weights for name in weight.sources}
    missing = sorted(name for name in wanted if f"{PREFIX}{name}" not in source)
    if missing:
        raise ConfigError(f"{path}: has no weight {missing[0]}, so it is of another student than this run's")


def _next(final: Path, config: Mapping[str, Any]) -> str:
    """Score it on the run's held-out data, or on some."""
    data = "FILE.jsonl"
    for node in (config.get("evaluation") or {}).values():
        data = ((node or {}).get("data") or {}).get("path") or data
    return f"kdcli evaluate student.path={shlex.quote(str(final))} evaluation.heldout.data.path={data}"
