"""student/: what `AutoModelForCausalLM.from_pretrained` loads, with a model card."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdcli.api import Engine
from kdcli.store import atomic, metrics
from kdcli.train.distiller import Distiller

PREFIX = "student.model."  # of the student's parameters in the Distiller's state

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
    """Write `run_dir/student`, replacing an earlier one only by a whole one. A collective."""
    final = run_dir / "student"
    state = engine.full_state_dict()
    if state is not None:  # rank 0
        beside = run_dir / ".tmp-student"
        shutil.rmtree(beside, ignore_errors=True)
        weights = {name.removeprefix(PREFIX): value for name, value in state.items() if name.startswith(PREFIX)}
        distiller.student.model.save_pretrained(beside, state_dict=weights)
        distiller.student.tokenizer.save_pretrained(beside)
        (beside / "README.md").write_text(_card(run_dir, config, evaluations), "utf-8")
        for path in beside.iterdir():
            atomic.fsync_file(path)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(beside, final)
        atomic.fsync_folder(run_dir)
    engine.gather(None)
    return final


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
