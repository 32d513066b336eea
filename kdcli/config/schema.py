"""The keys of `run` and `batch`, and which sections a config of each verb has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from kdcli.api import Data

COMPONENTS = {  # section -> the interface in kdcli.api its `_target_` implements
    "teacher": "Teacher",
    "student": "Student",
    "student_init": "StudentInit",
    "objective": "Objective",
    "rollout": "Rollout",
    "augmentation": "Transform",
    "writer": "Writer",
    "data": "Data",
    "domain_scheduler": "DomainScheduler",
    "evaluation": "Evaluator",
    "report": "Reporter",
    "engine": "Engine",
    "launch": "Launcher",
}
THIRD_PARTY = ("optimizer", "lr_schedule")
TERMS = ("objective", "evaluation", "report", "augmentation", "writer")  # mappings: a name you choose -> component
SECTIONS = {
    "distill": ("run", "batch", "probe", *COMPONENTS, *THIRD_PARTY, "optimize", "augment", "budget", "terms"),
    "evaluate": ("run", "batch", "teacher", "student", "evaluation", "report", "engine", "launch"),
    "cache": ("run", "batch", "cache", "teacher", "student", "data", "report", "engine", "launch"),
    "augment": ("run", "augment", "budget", "terms", "data", "writer", "augmentation", "report", "launch"),
}


def at_least(minimum: float, default: Any) -> Any:
    """A dataclass field whose value must not lie below `minimum`."""
    return field(default=default, metadata={"minimum": minimum})


@dataclass(frozen=True, kw_only=True)
class Run:
    """The section `run` of a distillation."""

    name: str
    dir: str
    seed: int = 0
    steps: int = at_least(1, 100)  # optimizer steps
    minutes: float | None = at_least(0, None)  # stop cleanly after this long, as if `steps` were reached
    log_every: int = at_least(1, 1)
    eval_every: int = at_least(0, 0)  # 0: only before and after
    save_every: int = at_least(0, 0)  # 0: only when interrupted and at the end
    keep_checkpoints: int = at_least(1, 2)
    resume: str = "auto"  # auto, never, or the path of a checkpoint
    export_dtype: Literal["bf16", "fp16", "fp32"] = "bf16"  # of the student's folder


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The section `batch` of a distillation."""

    size: int = at_least(1, 8)  # sequences of one optimizer step, over all processes
    micro_size: int = at_least(1, 4)  # sequences of one forward
    max_length: int = at_least(2, 512)  # tokens of a row
    packing: bool = False
    overflow: Literal["split", "truncate"] = "split"  # what happens to longer `text` rows


@dataclass(frozen=True, kw_only=True)
class Probe:
    """The section `probe` of a distillation: held-out rows, for domain schedulers that measure."""

    data: Data | None = None  # null: the last rows of each training domain
    rows: int = at_least(1, 500)  # of each domain
    micro_size: int | None = at_least(1, None)  # sequences of one forward; null: batch.micro_size


@dataclass(frozen=True, kw_only=True)
class EvaluateRun:
    """The section `run` of an evaluation."""

    name: str
    dir: str
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class EvaluateBatch:
    """The section `batch` of an evaluation."""

    micro_size: int = at_least(1, 4)
    max_length: int = at_least(2, 512)


@dataclass(frozen=True, kw_only=True)
class CacheBatch:
    """The section `batch` of a cache."""

    micro_size: int = at_least(1, 8)
    max_length: int = at_least(2, 512)
    overflow: Literal["split", "truncate"] = "split"


@dataclass(frozen=True, kw_only=True)
class Cache:
    """The section `cache`: where a teacher's signal is written, and how it is kept."""

    path: str
    codec: Literal["topk", "sampled"] = "topk"
    k: int | None = at_least(1, 64)  # of topk; null: all ids
    bits: Literal[8, 16, 32] = 8  # of topk: of a log-probability
    samples: int = at_least(1, 50)  # of sampled
    seed: int = 0  # of sampled
    temperature: float = 1.0
    rejected: bool = False  # the worse answers of preference pairs too
    shard_mib: int = at_least(1, 64)


@dataclass(frozen=True, kw_only=True)
class AugmentRun:
    """The section `run` of an augmentation."""

    name: str
    dir: str
    seed: int = 0
    resume: Literal["auto", "never"] = "auto"


@dataclass(frozen=True, kw_only=True)
class Augment:
    """The section `augment`: how a pipeline of augmentation runs."""

    answers: str = "caches/answers.sqlite"  # the store of all that writers have answered
    max_failed_fraction: float = at_least(0, 0.1)  # of a step's requests; more that fail end the run
    plan_rows: int = at_least(2, 200)  # of the data, that a dry run looks at


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The section `budget`: what a run folder may spend, over all its continuations."""

    max_cost: float | None = at_least(0, None)
    max_calls: int | None = at_least(0, None)
    max_tokens: int | None = at_least(0, None)


@dataclass(frozen=True, kw_only=True)
class Terms:
    """The section `terms`: what the result is for, as declared, and which conditions are met."""

    use: str | None = None
    acknowledged: Sequence[str] = ()


OF_AUGMENTATION = {"augment": Augment, "budget": Budget, "terms": Terms}
SCHEMAS = {
    "distill": {"run": Run, "batch": Batch, "probe": Probe, **OF_AUGMENTATION},
    "evaluate": {"run": EvaluateRun, "batch": EvaluateBatch},
    "cache": {"run": EvaluateRun, "batch": CacheBatch, "cache": Cache},
    "augment": {"run": AugmentRun, **OF_AUGMENTATION},
}
