"""student/: what transformers' from_pretrained loads, with a model card; and what the objectives learned."""

from __future__ import annotations

import itertools
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdcli.api import Engine
from kdcli.store import atomic, blueprint
from kdcli.store.blueprint import Blueprint
from kdcli.store.shards import LIMIT, Shards, Weight, value_of
from kdcli.train import card
from kdcli.train.distiller import Distiller

PREFIX = "student.model."  # of the student's parameters in the Distiller's state
LEARNED = "objectives"  # RUN_DIR/objectives/TERM.safetensors
ADAPTER = "adapter"  # in the student's folder: the adapter alone, as peft keeps one
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

Read = Callable[[Sequence[str]], AbstractContextManager[list[Tensor]]]  # the student's tensors by name; a collective


def export(
    distiller: Distiller, engine: Engine, run_dir: Path, config: Mapping[str, Any], evaluations: Mapping[str, Any]
) -> Path:
    """Write `run_dir/student`, and `run_dir/objectives` where an objective learned something, replacing earlier ones
    only by whole ones. A collective: rank 0 takes one parameter after the other and keeps none, the others nothing.

    Raises on every rank what stopped rank 0.
    """
    del evaluations
    student, final = distiller.student, run_dir / "student"
    section = config.get("run") or {}
    dtype = DTYPES[section.get("export_dtype", "bf16")]
    tensors = dict(student.model.named_parameters(remove_duplicate=False)) | dict(student.model.named_buffers())
    plan = blueprint.of(student)
    writer = None
    if engine.rank == 0:
        writer = StudentFolder(final, plan, dtype, lambda folder: _furnish(folder, student, dtype), student.model)
    write_weights(plan, _reading(engine, tensors), writer)
    if writer is not None:
        writer.finish(card.text(run_dir, config, final, plan.auto))
    learned = _learned(distiller, engine)
    problem = writer.problem if writer is not None else None
    if engine.rank == 0 and problem is None:
        try:
            _export_learned(distiller, learned, run_dir)
        except Exception as error:
            problem = error
    problem = engine.gather(problem)[0]
    if problem is not None:
        raise problem
    return final


class StudentFolder:
    """A student's folder in the making, beside where it will be. What goes wrong is kept in `problem` and ends the
    writing, not the reading: other ranks take part in that."""

    def __init__(
        self,
        final: Path,
        plan: Blueprint,
        dtype: torch.dtype,
        furnish: Callable[[Path], None],
        model: Any,
        limit: float = LIMIT,
    ) -> None:
        self.final = final
        self.beside = final.parent / f".tmp-{final.name}"
        self.plan = plan
        self.dtype = dtype
        self.problem: Exception | None = None
        self._model = model
        self._conversions = _conversions(model)
        self._shards: dict[str, Shards] = {}
        self._try(lambda: self._begin(furnish, limit))

    def _begin(self, furnish: Callable[[Path], None], limit: float) -> None:
        shutil.rmtree(self.beside, ignore_errors=True)
        self.beside.mkdir(parents=True)
        furnish(self.beside)
        names = {weight.name for weight in self.plan.weights}
        if self.converts():
            numbers = blueprint.skeleton(self.beside, self.plan.auto).state_dict()
            names |= set(self._as_published(numbers))
        self._shards["model"] = Shards(self.beside, names, limit=limit)
        if self.plan.adapter:
            folder = self.beside / ADAPTER
            folder.mkdir()
            atomic.write_json(folder / "adapter_config.json", self.plan.adapter_config)
            names = self.plan.adapter
            self._shards[ADAPTER] = Shards(folder, names, limit=float("inf"), stem="adapter_model")

    def add(self, group: Sequence[tuple[Weight, Sequence[Tensor]]]) -> None:
        """Weights that belong together, each with what it is made of."""
        self._try(lambda: self._add(group))

    def _add(self, group: Sequence[tuple[Weight, Sequence[Tensor]]]) -> None:
        made = {weight.name: self._cast(weight.made_of(tensors)) for weight, tensors in group}
        for name, tensor in self._as_published(made).items():
            self._shards["model"].add(name, tensor)

    def add_adapter(self, name: str, tensor: Tensor) -> None:
        self._try(lambda: self._shards[ADAPTER].add(name, tensor))

    def finish(self, text: str) -> None:
        """Close the files, write the card, and put the folder in its place."""
        self._try(lambda: self._finish(text))

    def _finish(self, text: str) -> None:
        for shards in self._shards.values():
            shards.close()
        (self.beside / "README.md").write_text(text, "utf-8")
        replace(self.final, self.beside)

    def converts(self) -> bool:
        """Whether the published form of this architecture's weights joins or splits them, as a layer's experts."""
        from transformers.core_model_loading import WeightConverter

        return any(isinstance(one, WeightConverter) for one in self._conversions)

    def _as_published(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights under the names and in the form in which this architecture is published."""
        if not self._conversions:
            return weights
        from transformers.core_model_loading import revert_weight_conversion

        return revert_weight_conversion(self._model, weights)

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def _try(self, action: Callable[[], None]) -> None:
        if self.problem is None:
            try:
                action()
            except Exception as error:
                self.problem = error


def write_weights(plan: Blueprint, read: Read, writer: StudentFolder | None) -> None:
    """Read a plan's weights one by one, and let rank 0's `writer` write them."""
    for group in _groups(plan.weights, together=writer is not None and writer.converts()):
        found: list[tuple[Weight, Sequence[Tensor]]] = []
        for weight in group:
            with read(weight.sources) as tensors:
                if writer is not None and len(group) == 1:
                    writer.add([(weight, tensors)])
                elif writer is not None:
                    found.append((weight, [tensor.clone() for tensor in tensors]))
        if found and writer is not None:
            writer.add(found)
    for name, source in plan.adapter.items():
        with read([source]) as tensors:
            if writer is not None:
                writer.add_adapter(name, tensors[0])


def replace(final: Path, beside: Path) -> None:
    """Put a finished folder in the place of an earlier one."""
    for path in beside.rglob("*"):
        atomic.fsync_file(path)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(beside, final)
    atomic.fsync_folder(final.parent)


def _reading(engine: Engine, tensors: Mapping[str, Any]) -> Read:
    """The live model's tensors, each whole while it is read."""

    @contextmanager
    def read(names: Sequence[str]) -> Iterator[list[Tensor]]:
        asked = [tensors[name] for name in names]
        with engine.whole(one for one in asked if isinstance(one, torch.nn.Parameter)):
            yield [value_of(one) for one in asked]

    return read


def _furnish(folder: Path, student: Any, dtype: torch.dtype) -> None:
    with_plan = folder.parent / f"{folder.name}-{blueprint.FOLDER}"
    shutil.rmtree(with_plan, ignore_errors=True)
    blueprint.write(with_plan, student)
    blueprint.furnish(folder, with_plan, dtype)
    shutil.rmtree(with_plan)


def _conversions(model: Any) -> Sequence[Any]:
    """What transformers does to the weights of this architecture as it loads them, to be undone."""
    known = getattr(model, "_weight_conversions", None)
    if known is not None:
        return known
    from transformers.conversion_mapping import get_model_conversion_mapping

    return get_model_conversion_mapping(model, add_legacy=False)


def _groups(weights: Sequence[Weight], *, together: bool) -> Iterator[list[Weight]]:
    """One by one, or if `together` layer by layer: names up to their first number."""
    if not together:
        yield from ([weight] for weight in weights)
        return
    for _, group in itertools.groupby(weights, lambda weight: re.split(r"(?<=\.\d)\d*\.", weight.name)[0]):
        yield list(group)


def _learned(distiller: Distiller, engine: Engine) -> dict[str, dict[str, Tensor]]:
    """Per term its parameters by name, frozen ones too, on rank 0; empty elsewhere."""
    found: dict[str, dict[str, Tensor]] = {}
    for term, objective in distiller.terms.items():
        parameters = dict(objective.named_parameters())
        with engine.whole(parameters.values()):
            if parameters and engine.rank == 0:
                found[term] = {name: value.detach().cpu().clone() for name, value in parameters.items()}
    return found


def _export_learned(distiller: Distiller, learned: Mapping[str, dict[str, Tensor]], run_dir: Path) -> None:
    """One file per term that has parameters, under their names in the objective."""
    from safetensors.torch import save_file

    if not learned:
        return
    beside = run_dir / f".tmp-{LEARNED}"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    for term, tensors in learned.items():
        kind = type(distiller.terms[term])
        target = f"{kind.__module__}.{kind.__qualname__}"
        whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(whole, beside / f"{term}.safetensors", metadata={"format": "pt", "objective": target})
    replace(run_dir / LEARNED, beside)
