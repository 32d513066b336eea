"""One process that augments: the pipeline of a config, its progress, and what its manifest says of the rows."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kdcli.config import augmented
from kdcli.errors import DataError, Interrupted, KDError
from kdcli.pipeline.budget import BudgetError
from kdcli.pipeline.pipeline import Pipeline
from kdcli.pipeline.progress import Outcome
from kdcli.store import atomic, provenance
from kdcli.store.content import file_hash
from kdcli.store.terms import NO_ADVICE
from kdcli.train.interrupt import Interrupt
from kdcli.worker.parts import change_status
from kdcli.worker.shown import Shown


def work(run_dir: Path, config: Mapping[str, Any], interrupt: Interrupt) -> None:
    """Do the steps that are not done. Raises what `Pipeline.run` raises, and says how to go on."""
    pipeline = augmented.pipeline_of(config, run_dir)
    interrupt.defer()
    shown = Shown(run_dir, config)
    again = _again(run_dir, config)
    try:
        outcome = pipeline.run(stopped=lambda: bool(interrupt.received), told=shown)
    except Interrupted as error:
        where = str(error).partition(";")[0]
        told = f"{where}; what was answered is stored, and is not asked again; go on with: {again}"
        raise Interrupted(interrupt.received, told) from None
    except BudgetError as error:
        what, _, _ = str(error).partition("; raise")
        limit = what.partition("=")[0]
        raise KDError(f"{what}; {shown.finished()}; go on with: {again} {limit}=MORE") from None
    finally:
        shown.close()
    _note(run_dir, pipeline, outcome)
    shown.table(outcome)
    change_status(run_dir, "done", exit_code=0)
    _tell(run_dir, config, outcome)
    if not outcome.count:
        raise DataError(_none_left(outcome))


def _again(run_dir: Path, config: Mapping[str, Any]) -> str:
    """The command that goes on: with the distillation, if the rows are made for one."""
    return f"kdcli resume {shlex.quote(str(config.get('made_for') or run_dir))}"


def _note(run_dir: Path, pipeline: Pipeline, outcome: Outcome) -> None:
    """What the rows were made of, into manifest.json."""
    file = run_dir / "manifest.json"
    try:
        known = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        known = {}
    atomic.write_json(file, known | {"augmentation": summary(pipeline, outcome)})


def summary(pipeline: Pipeline, outcome: Outcome) -> dict[str, Any]:
    """Rows by source, licence and writer, steps with what they set aside, and what all of it cost."""
    names = {one.hash: one.name for step in pipeline.steps.values() for one in _prompts(step)}
    return {
        "key": outcome.key,
        "hash": file_hash(outcome.rows),
        **provenance.described(provenance.of_file(outcome.rows), names),
        "forms": dict(outcome.forms),
        "unreadable": dict(outcome.unreadable),
        "steps": [asdict(step) for step in outcome.steps],
        "spent": asdict(outcome.spent),
        "answers": str(pipeline.answers),
        "note": NO_ADVICE,
    }


def _prompts(step: Any) -> list[Any]:
    """The prompt files of a step, however it holds them."""
    found: list[Any] = []
    for value in vars(step).values():
        items = value if isinstance(value, list | tuple) else value.values() if isinstance(value, dict) else [value]
        found += [one for one in items if hasattr(one, "hash") and hasattr(one, "paper")]
    return found


def _none_left(outcome: Outcome) -> str:
    worst = max(outcome.steps, key=lambda step: step.rows_in - step.rows_out)
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in worst.aside.items()) or "it made none"
    return (
        f"no row is left: augmentation.{worst.name} made {worst.rows_out:,} of {worst.rows_in:,} ({reasons}); "
        f"{outcome.aside} says of each why, so loosen that step, or give other data"
    )


def _tell(run_dir: Path, config: Mapping[str, Any], outcome: Outcome) -> None:
    spent = outcome.spent
    cost = f", cost {spent.cost:,.4g}" if spent.cost else ""
    print(f"\nrows: {outcome.rows}, {outcome.count:,} rows; {spent.calls:,} calls, {spent.tokens:,} tokens{cost}")
    aside = sum(count for step in outcome.steps for count in step.aside.values())
    if aside:
        print(f"      {aside:,} were set aside, each with its reason: {outcome.aside}")
    if config.get("made_for") or not outcome.count:
        return
    rows = shlex.quote(str(outcome.rows))
    if outcome.unreadable:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in outcome.unreadable.items())
        print(f"      `kdcli distill` cannot read all of them as they are ({reasons})")
    print(f"next:  kdcli distill data.path={rows} …", flush=True)
