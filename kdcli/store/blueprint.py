"""What a student's folder has beside its weights, and which weights it gets: enough to export any checkpoint of a run
without its models, its data or the network."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from kdcli.api import Student
from kdcli.store.adapters import CHANGES_BASE, Adapter
from kdcli.store.shards import Weight, adapter_names, weights_of

FOLDER = "blueprint"  # in a run's folder
FILE = "blueprint.json"


@dataclass(frozen=True, kw_only=True)
class Blueprint:
    """Which weights a student exports, and its adapter's: their names in peft's file -> in the model."""

    auto: str  # the class of transformers that loads it
    weights: list[Weight]
    adapter: dict[str, str] = field(default_factory=dict)
    adapter_config: Mapping[str, Any] = field(default_factory=dict)  # peft's


def of(student: Student) -> Blueprint:
    """The blueprint of a student that is ready to train. The adapter is told apart where the model that it belongs to
    can be had: the one that `student.path` names, unchanged."""
    adapter, path = getattr(student, "adapter", None), getattr(student, "path", None)
    named: dict[str, str] = {}
    config: dict[str, Any] = {}
    own = isinstance(adapter, Adapter) and adapter.init not in CHANGES_BASE and not getattr(student, "new_tokens", None)
    if isinstance(adapter, Adapter) and own and path is not None and not getattr(student, "made", False):
        named = adapter_names(student.model)
        beside = {name.rpartition(".")[0] for name in named.values() if ".lora_" not in name}
        config = adapter.described(path, sorted(beside))
    return Blueprint(auto=student.auto, weights=weights_of(student.model), adapter=named, adapter_config=config)


def write(folder: Path, student: Student) -> Blueprint:
    """Write everything but the weights into `folder`: config, generation config, the model's own code, tokenizer."""
    model, blueprint = student.model, of(student)
    folder.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # what is exported is not quantized
    if model.is_remote_code():
        from transformers.dynamic_module_utils import custom_object_save

        custom_object_save(model, folder, config=config)
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    student.tokenizer.save_pretrained(folder)
    (folder / FILE).write_text(json.dumps(asdict(blueprint), indent=1), "utf-8")
    return blueprint


def keep(run_dir: Path, student: Student) -> None:
    """Write the blueprint of a run's student into the run's folder, in place of an earlier one."""
    beside = run_dir / f".tmp-{FOLDER}"
    shutil.rmtree(beside, ignore_errors=True)
    write(beside, student)
    shutil.rmtree(run_dir / FOLDER, ignore_errors=True)
    os.replace(beside, run_dir / FOLDER)


def read(folder: Path) -> Blueprint:
    """What `write` wrote."""
    content = json.loads((folder / FILE).read_text("utf-8"))
    return Blueprint(**{**content, "weights": [Weight(**weight) for weight in content["weights"]]})


def furnish(folder: Path, blueprint: Path, dtype: torch.dtype) -> None:
    """Copy what is no weight into `folder`, with `dtype` in the config."""
    shutil.copytree(blueprint, folder, dirs_exist_ok=True)
    (folder / FILE).unlink()
    file = folder / "config.json"
    config = json.loads(file.read_text("utf-8"))
    config["dtype"] = str(dtype).removeprefix("torch.")
    config.pop("torch_dtype", None)
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")


def skeleton(blueprint: Path, auto: str) -> Any:
    """The model that a blueprint describes, without numbers."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(blueprint)
    with torch.device("meta"):
        return getattr(transformers, auto).from_config(config)
