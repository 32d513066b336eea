"""What the sections of an augmentation ask of each other, before any writer is asked; and the pipeline they make."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcli.config import packages, terms
from kdcli.config.build import build, build_terms
from kdcli.config.environment import expand
from kdcli.config.nearest import suggest
from kdcli.config.schema import Augment
from kdcli.errors import ConfigError, DataError
from kdcli.store.address import read_key

if TYPE_CHECKING:
    from kdcli.pipeline.pipeline import Pipeline

NOTE = "augmented.json"  # in the folder of a distillation: the rows that it learns from
LOOKED_AT = 100_000  # rows of each domain of the seeds, before anything is asked


def given(config: Mapping[str, Any]) -> bool:
    """Whether a config has steps of augmentation."""
    return any(step is not None for step in (config.get("augmentation") or {}).values())


def problems_in(config: Mapping[str, Any], objects: Mapping[str, Any]) -> list[str]:
    """One sentence per contradiction. `objects`: components by their place in the config, built."""
    if not given(config):
        nothing = "augmentation: no step is chosen; add one: +augmentation@augmentation.NAME=STEP (see `kdcli ls`)"
        return terms.of_rows(config) if config["verb"] == "distill" else [nothing] * (config["verb"] == "augment")
    problems = [problem for name, step in _of(objects, "augmentation") for problem in _writers(config, name, step)]
    for section in ("augmentation", "writer"):
        for name, one in _of(objects, section):
            problems += packages.problems_of(one, f"{section}.{name}")
    for name, writer in _of(objects, "writer"):
        problems += _key(name, writer)
    return problems or terms.of_writers(config, dict(asked(objects)))


def warnings_in(config: Mapping[str, Any]) -> list[str]:
    """What a user should know before a run that nothing forbids."""
    from kdcli.api import Transform, Writer

    if not given(config):
        return terms.of_rows_undeclared(config) if config["verb"] == "distill" else []
    steps, writers = build_terms(config["augmentation"], Transform), build_terms(config.get("writer"), Writer)
    wanted = {name for step in steps.values() for name in step.writers()}
    found = [
        f"writer.{name}: no step asks it; {suggest(name, wanted)}"
        if wanted
        else f"writer.{name}: no step asks a writer"
        for name in writers
        if name not in wanted
    ]
    if (config.get("budget") or {}).get("max_cost") is not None:
        found += [
            f"writer.{name}: has no price, so budget.max_cost does not stop it; set writer.{name}.price_prompt and "
            "price_completion"
            for name, writer in writers.items()
            if name in wanted and writer.endpoint != "local" and not writer.price_prompt + writer.price_completion
        ]
    return found + terms.undeclared(config, {name: writers[name] for name in writers if name in wanted})


def pipeline_of(config: Mapping[str, Any], folder: Path) -> Pipeline:
    """The pipeline that a config's sections make. Raises ConfigError."""
    from kdcli.api import Data, Transform, Writer
    from kdcli.pipeline.budget import Budget
    from kdcli.pipeline.pipeline import Pipeline

    how = settings_of(config)
    return Pipeline(
        data=build(config["data"], Data),
        steps=build_terms(config["augmentation"], Transform),
        writers=build_terms(config.get("writer"), Writer),
        settings={name: node for name, node in config["augmentation"].items() if node is not None},
        folder=folder,
        answers=answers_of(config),
        seed=config["run"]["seed"],
        budget=Budget(**(config.get("budget") or {})),
        max_failed_fraction=how.max_failed_fraction,
    )


def as_trained(config: Mapping[str, Any], rows: Path) -> dict[str, Any]:
    """The config of a distillation that learns from rows that were made: of their data alone."""
    return {**config, "data": _node(rows), "augmentation": {}, "writer": {}}


def note_of(run_dir: Path) -> dict[str, Any] | None:
    """{key, rows, hash} of the rows that a distillation learns from; None if it has made none yet."""
    try:
        return json.loads((run_dir / NOTE).read_text("utf-8"))
    except (OSError, ValueError):
        return None


def data_of(run_dir: Path, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The data that a distillation reads: its own, or the rows that were made of them. Raises ConfigError."""
    if not given(config):
        return config["data"]
    note = note_of(run_dir)
    if note is None:
        raise ConfigError(f"{run_dir}: the rows of its augmentation were not made; go on with: kdcli resume {run_dir}")
    return _node(Path(note["rows"]))


def _node(rows: Path) -> dict[str, Any]:
    node: dict[str, Any] = {"_target_": "kdcli.data.jsonl.Jsonl", "path": str(rows), "domain": None, "columns": None}
    return node | {"limit": None, "max_bad_fraction": 0.0}


def settings_of(config: Mapping[str, Any]) -> Augment:
    """The section `augment`, with what it leaves out."""
    return Augment(**(config.get("augment") or {}))


def answers_of(config: Mapping[str, Any]) -> Path:
    """Where the answers are stored."""
    return Path(expand(settings_of(config).answers)).expanduser()


def asked(objects: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Writers by name that some step asks."""
    wanted = {name for _, step in _of(objects, "augmentation") for name in step.writers()}
    return ((name, writer) for name, writer in _of(objects, "writer") if name in wanted)


def _of(objects: Mapping[str, Any], section: str) -> Iterable[tuple[str, Any]]:
    return [
        (where.partition(".")[2], item)
        for where, item in objects.items()
        if where.startswith(f"{section}.") and item is not None
    ]


def _writers(config: Mapping[str, Any], name: str, step: Any) -> list[str]:
    """A step asks writers that there are."""
    known = [key for key, node in (config.get("writer") or {}).items() if node is not None]
    node = config["augmentation"][name]
    problems = []
    for wanted in step.writers():
        if wanted in known:
            continue
        key = next((key for key, value in node.items() if key.startswith("writer") and value == wanted), "writer")
        add = f"add +writer@writer.{wanted}=chat"
        hint = f"{suggest(wanted, known)} Or {add}" if suggest(wanted, known).startswith("did") else add
        problems.append(
            f"augmentation.{name}.{key}: asks {wanted}, which the section `writer` lacks "
            f"(it has {', '.join(known) or 'none'}); {hint}"
        )
    return problems


def _key(name: str, writer: Any) -> list[str]:
    """The variable that should hold a writer's key is set, and holds a key for the writer's server."""
    client = getattr(writer, "client", None)
    variable = getattr(client, "api_key_env", None)
    if client is None or not variable:
        return []
    try:
        read_key(variable, client.server, f"writer.{name}.api_key_env")
    except ConfigError as error:
        return list(error.problems)
    return []


def checked(config: Mapping[str, Any]) -> list[str]:
    """All problems of the sections of `kdcli augment`, each sound by itself."""
    from kdcli.config.cross import built  # here, because that module looks at these sections too

    objects, problems = built(config)
    return problems + seeds_problems(objects.get("data")) + problems_in(config, objects)


def seeds_problems(data: Any) -> list[str]:
    """What is wrong with the rows that an augmentation begins with; none of them is met when others are paid for."""
    if data is None:
        return []
    try:
        for rows in data.seeds().values():
            deque(islice(rows, LOOKED_AT), maxlen=0)
    except (ConfigError, DataError) as error:
        told = getattr(error, "problems", (str(error),))
        return [p if p.startswith("data") else f"data: {p}" for p in told]
    return []
