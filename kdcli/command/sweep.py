"""Sweeps: one isolated run per combination, in a folder that the same command finds again; a table at the end."""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import xxhash
from hydra._internal.hydra import Hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kdcli.command import runs, sweep_table
from kdcli.command.compose import compose, explain, plain
from kdcli.errors import ConfigError, Interrupted, KDError
from kdcli.report._summary import log_gap_closed
from kdcli.store import atomic, metrics, status

RECORD = ".job.json"  # in a job's folder: what it was asked, and how it ended
WHERE_NOT_WHAT = ("hydra/launcher=", "hydra.launcher.", "+hydra.launcher.", "hydra.sweep.dir=")


def run(app: Hydra, verb: str, overrides: Sequence[str], adjust: Callable[[dict[str, Any]], None]) -> int:
    """Run all jobs, print their table; 1 if any failed. Run again, it skips what is done and goes on with the rest.

    Raises ConfigError for a combination that does not compose, Interrupted after Ctrl-C.
    """
    overrides = [*overrides, "hydra.mode=MULTIRUN"]
    master = compose(app, verb, overrides, RunMode.MULTIRUN)
    if any(one.lstrip("+").startswith("run.dir=") for one in overrides):
        raise ConfigError("run.dir: jobs of a sweep have folders of their own; set hydra.sweep.dir=FOLDER instead")
    if "optuna" in str(master.hydra.sweeper._target_):
        overrides += _searched(master)
    folder = _folder(master, overrides)
    job = Job(verb, adjust)
    interrupted = False
    try:
        app.multirun(config_name=verb, task_function=job, overrides=[*overrides, f"hydra.sweep.dir={folder}"])
    except (HydraException, OmegaConfBaseException) as error:
        raise explain(error, app, verb, overrides) from error
    except ValueError as error:
        if "No trials are completed yet" not in str(error):  # optuna, when all failed; the table says why
            raise
    except KeyboardInterrupt:
        interrupted = True
    finally:
        rows = _rows(folder)
        if not rows:
            _remove_empty(folder)
    atomic.write_json(folder / "sweep.json", rows)
    if groups := sweep_table.means(rows):
        atomic.write_json(folder / "means.json", groups)
    sweep_table.show(rows, folder)
    if interrupted:
        raise Interrupted(2, f"sweep stopped; the same command goes on with it (folder {folder})")
    return 1 if any(row["state"] != "done" for row in rows) else 0


def _searched(master: DictConfig) -> list[str]:
    """What a search with optuna needs besides: a metric, and a seed, so that the same command tries the same values."""
    import optuna

    if not master.get("optimize"):
        raise ConfigError("optimize: a search needs the metric to improve; add optimize=eval/heldout/all/kl or another")
    optuna.logging.set_verbosity(logging.WARNING)
    sampler = master.hydra.sweeper.get("sampler") or {}
    return [f"hydra.sweeper.sampler.seed={master.run.seed}"] if sampler.get("seed", 0) is None else []


class Job:
    """What a sweeper calls for each combination, in this process or another; never raises, so the others go on."""

    def __init__(self, verb: str, adjust: Callable[[dict[str, Any]], None]) -> None:
        self.verb = verb
        self.adjust = adjust

    def __call__(self, config: DictConfig) -> float | None:
        context = HydraConfig.get()
        run_dir = Path(os.path.relpath(context.runtime.output_dir))
        overrides = list(context.overrides.task)
        print(f"\n=== job {context.job.num}: {' '.join(overrides)}\n    in {run_dir}", flush=True)
        code, reason = self._run(config, run_dir, overrides)
        record = {"number": context.job.num, "overrides": overrides, "exit_code": code, "reason": reason}
        atomic.write_json(run_dir / RECORD, record)
        if code in (130, 143):
            raise KeyboardInterrupt
        wanted = config.get("optimize")
        return _last(run_dir).get(wanted) if wanted and code == 0 else None

    def _run(self, config: DictConfig, run_dir: Path, overrides: Sequence[str]) -> tuple[int, str]:
        try:
            values = plain(config, self.verb)
            values["run"]["dir"] = str(run_dir)
            self.adjust(values)
            code = runs.start(values, overrides=overrides, isolate=True)
            return code, "" if code == 0 else str(status.read(run_dir).get("reason", ""))
        except KDError as error:
            print(f"error: {error}", file=sys.stderr)
            return error.exit_code, str(error)
        except Exception as error:  # a bug in one job is a failed row, not the end of the others
            traceback.print_exc()
            return 1, f"{type(error).__name__}: {error}"


def _folder(master: DictConfig, overrides: Sequence[str]) -> Path:
    """hydra.sweep.dir if the user sets it, else a name made of what was asked for, but not of where it runs."""
    if any(one.startswith("hydra.sweep.dir=") for one in overrides):
        return Path(str(master.hydra.sweep.dir))
    what = [one for one in overrides if not one.startswith(WHERE_NOT_WHAT)]
    name = OmegaConf.select(master, "run.name")
    base = Path("runs", name) if isinstance(name, str) and runs.NAME.fullmatch(name) else Path("runs")
    return base / f"sweep-{xxhash.xxh3_64_hexdigest(json.dumps(what).encode())[:8]}"


def _rows(folder: Path) -> list[dict[str, Any]]:
    """One row per job that ran in the folder, in the order of their numbers."""
    rows = []
    for file in folder.glob(f"*/{RECORD}"):
        record = json.loads(file.read_text("utf-8"))
        state = status.read(file.parent)
        done = record["exit_code"] == 0
        rows.append(
            {
                **record,
                "state": "done" if done else "interrupted" if state.get("state") == "interrupted" else "failed",
                "step": state.get("step", 0),
                "folder": str(file.parent),
                "metrics": _last(file.parent),
                "closed": _closed(file.parent),
            }
        )
    return sorted(rows, key=lambda row: row["number"])


def _last(run_dir: Path) -> dict[str, float]:
    """The last value of each loss and evaluation."""
    last: dict[str, float] = {}
    for line in metrics.read(run_dir):
        last |= {key: value for key, value in line.items() if key.startswith(("loss/", "eval/"))}
    return last


def _closed(run_dir: Path) -> dict[str, float]:
    """Share of the gap to the teacher that the run closed, per evaluation: of log perplexity, over all domains."""
    found: dict[str, float] = {}
    lines = metrics.read(run_dir)
    keys = {key for line in lines for key in line if key.startswith("eval/") and key.endswith("/all/teacher_ppl")}
    for key in sorted(keys):
        name = key.removeprefix("eval/").removesuffix("/all/teacher_ppl")
        said = [line for line in lines if key in line]
        ppl = key.replace("teacher_ppl", "ppl")
        share = log_gap_closed(said[0].get(ppl), said[-1].get(ppl), said[-1][key])
        if len(said) > 1 and share is not None:
            found[name] = share
    return found


def _remove_empty(folder: Path) -> None:
    """A sweep none of whose jobs began leaves nothing behind."""
    (folder / "multirun.yaml").unlink(missing_ok=True)
    for place in (folder, *folder.parents):
        if place == Path(".") or not place.is_dir() or any(place.iterdir()):
            return
        place.rmdir()
