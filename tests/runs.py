"""Tiny whole runs for tests: a run folder written by hand, and a worker of them (tests/distributed.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

import kdcli.worker
from kdcli.store import metrics, status
from tests.distributed import collect_ranks

TEXT = "the cat sat on a mat and saw the dog that ran after a ball in the sun while it was still day"
WORDS = TEXT.split()
VOLATILE = ("time", "tokens_per_second", "probe/seconds")


def config(**changes: Any) -> dict[str, Any]:
    """A run of seconds; `changes` are dotted keys with `__` for the dot, such as run__steps=4."""
    base: dict[str, Any] = {
        "verb": "distill",
        "run": {"name": "tiny", "dir": "", "seed": 1, "steps": 4, "save_every": 2, "log_every": 1, "resume": "auto"},
        "batch": {"size": 4, "micro_size": 2, "max_length": 32, "packing": False, "overflow": "split"},
        "teacher": {
            "_target_": "kdcli.teacher.hf.HFTeacher",
            "path": "recipes://data/tiny_teacher",
            "dtype": "float32",
        },
        "student": {"_target_": "kdcli.student.hf.HFStudent", "path": None},
        "student_init": {
            "_target_": "kdcli.student_init.from_config.FromConfig",
            "config": {
                "model_type": "llama",
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "attention_dropout": 0.1,  # random numbers are part of what a resume must get right
                "tie_word_embeddings": True,
            },
        },
        "objective": {"kd": {"_target_": "kdcli.objective.forward_kl.ForwardKL"}},
        "rollout": {"_target_": "kdcli.rollout.dataset.Dataset"},
        "data": {"_target_": "kdcli.data.jsonl.Jsonl", "path": ""},
        "domain_scheduler": {"_target_": "kdcli.domain_scheduler.natural.Natural"},
        "evaluation": {},
        "report": {},
        "engine": {"_target_": "kdcli.engine.zero.Zero", "stage": 0, "precision": "fp32"},
        "launch": {"_target_": "kdcli.launch.torchrun.Torchrun", "processes": 1},
        "optimizer": {"_target_": "torch.optim.AdamW", "lr": 0.01},
        "lr_schedule": {
            "_target_": "transformers.get_cosine_schedule_with_warmup",
            "num_warmup_steps": 1,
            "num_training_steps": 8,
        },
        "probe": {"data": None, "rows": 500, "micro_size": None},
        "optimize": None,
    }
    for key, value in changes.items():
        *parents, last = key.split("__")
        node = base
        for parent in parents:
            node = node[parent]
        node[last] = value
    return base


def write_run(folder: Path, **changes: Any) -> Path:
    """`folder/run` with its config.yaml, and `folder/data` with two domains."""
    data = folder / "data"
    if not data.exists():
        data.mkdir(parents=True)
        for domain in ("prose", "verse"):
            rows = [" ".join(WORDS[(i + j) % len(WORDS)] for j in range(9 + i % 5)) for i in range(12)]
            (data / f"{domain}.jsonl").write_text(
                "".join(json.dumps({"text": f"{domain} {row}"}) + "\n" for row in rows)
            )
    run_dir = folder / "run"
    run_dir.mkdir(exist_ok=True)
    content = config(**{"data__path": str(data), "run__dir": str(run_dir), **changes})
    (run_dir / "config.yaml").write_text(yaml.safe_dump(content))
    return run_dir


def heldout(folder: Path) -> dict[str, Any]:
    """An evaluation on the training text."""
    data = {"_target_": "kdcli.data.jsonl.Jsonl", "path": str(folder / "data")}
    return {
        "heldout": {
            "_target_": "kdcli.evaluation.heldout.Heldout",
            "data": data,
            "rows": 2,
            "max_length": 32,
            "micro_size": 2,
        }
    }


def work(run_dir: Path, *, ranks: int = 1, fault: str = "", timeout: float = 240.0) -> list[Any]:
    """Each rank's exit code; None for a rank that was killed."""
    env = {"KDCLI_TESTING": "1", "KDCLI_FAULT": fault, "KDCLI_CACHE": str(run_dir.parent / "cache")}
    outcomes = collect_ranks(ranks, kdcli.worker.main, run_dir, timeout=timeout, env=env, join=ranks > 1)
    return [value if ok else None for ok, value in outcomes]


def lines(run_dir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what differs between two equal runs."""
    return [{key: value for key, value in line.items() if key not in VOLATILE} for line in metrics.read(run_dir)]


def state(run_dir: Path) -> dict[str, Any]:
    return status.read(run_dir)


def checkpoints(run_dir: Path) -> list[str]:
    folder = run_dir / "checkpoints"
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []
