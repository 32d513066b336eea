"""student/: what `AutoModelForCausalLM.from_pretrained` loads, with a model card; and what the objectives learned."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from kdcli.api import Engine
from kdcli.store import atomic, metrics
from kdcli.train.distiller import Distiller

PREFIX = "student.model."  # of the student's parameters in the Distiller's state
LEARNED = "objectives"  # RUN_DIR/objectives/TERM.safetensors

CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [distillation, kdcli]
---
# {name}

A language model distilled with kdcli.

| | |
|---|---|
| teacher | {teacher} |
| student began as | {student} |
| data | {data} |
| objectives | {objectives} |
| optimizer steps | {steps} |
| supervised tokens | {tokens:,.0f} |

{evaluation}The licences and terms of the teacher, the student and the data apply to this model;
the run's manifest.json records them.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{path}")
tokenizer = AutoTokenizer.from_pretrained("{path}")
```
"""


def export(
    distiller: Distiller, engine: Engine, run_dir: Path, config: Mapping[str, Any], evaluations: Mapping[str, Any]
) -> Path:
    """Write `run_dir/student`, and `run_dir/objectives` where an objective learned something, replacing earlier ones
    only by whole ones. A collective."""
    final = run_dir / "student"
    state = engine.full_state_dict()
    if state is not None:  # rank 0
        beside = run_dir / ".tmp-student"
        shutil.rmtree(beside, ignore_errors=True)
        weights = {name.removeprefix(PREFIX): value for name, value in state.items() if name.startswith(PREFIX)}
        distiller.student.model.save_pretrained(beside, state_dict=weights)
        distiller.student.tokenizer.save_pretrained(beside)
        (beside / "README.md").write_text(_card(run_dir, config, evaluations), "utf-8")
        _replace(final, beside)
        _export_learned(distiller, state, run_dir)
    engine.gather(None)
    return final


def _export_learned(distiller: Distiller, state: Mapping[str, Tensor], run_dir: Path) -> None:
    """One file per term that has parameters, under their names in the objective; frozen ones are part of it."""
    from safetensors.torch import save_file

    learned = {
        term: {name: state[_place(term, name)].contiguous() for name, _ in objective.named_parameters()}
        for term, objective in distiller.terms.items()
    }
    learned = {term: tensors for term, tensors in learned.items() if tensors}
    if learned:
        beside = run_dir / f".tmp-{LEARNED}"
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
        for term, tensors in learned.items():
            kind = type(distiller.terms[term])
            target = f"{kind.__module__}.{kind.__qualname__}"
            save_file(tensors, beside / f"{term}.safetensors", metadata={"format": "pt", "objective": target})
        _replace(run_dir / LEARNED, beside)


def _place(term: str, name: str) -> str:
    """Where the Distiller's state has what a term learned: its gathered head owns it."""
    return "gathered_head." + f"{term}/{name}".replace(".", "/")


def _replace(final: Path, beside: Path) -> None:
    """Put a finished folder in the place of an earlier one."""
    for path in beside.iterdir():
        atomic.fsync_file(path)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(beside, final)
    atomic.fsync_folder(final.parent)


def _card(run_dir: Path, config: Mapping[str, Any], evaluations: Mapping[str, Any]) -> str:
    lines = metrics.read(run_dir)
    last = lines[-1] if lines else {}
    table = [
        f"| {key.removeprefix('eval/')} | {value:.4g} |"
        for key, value in last.items()
        if key.startswith("eval/") and value is not None
    ]
    head = ["Held-out results of the last step:", "", "| metric | value |", "|---|---|"]
    return CARD.format(
        name=config.get("run", {}).get("name", "student"),
        teacher=_path(config, "teacher"),
        student=_path(config, "student_init"),
        data=_path(config, "data"),
        objectives=", ".join(f"{name} ({_target(node)})" for name, node in config.get("objective", {}).items() if node),
        steps=last.get("step", 0),
        tokens=last.get("tokens") or 0,
        evaluation="\n".join([*head, *table, "", ""]) if table and evaluations else "",
        path=run_dir / "student",
    )


def _target(node: Mapping[str, Any]) -> str:
    return str(node.get("_target_", "")).rpartition(".")[2]


def _path(config: Mapping[str, Any], section: str) -> str:
    node = config.get(section) or {}
    where = node.get("path")
    return f"{_target(node)}: {where}" if where else _target(node)
