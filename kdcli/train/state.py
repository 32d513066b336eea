"""The part of a checkpoint that is ours, without pickles: state.json, state.safetensors, random numbers per rank."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

TENSOR = "__tensor__"  # {TENSOR: name} in state.json stands for a tensor of state.safetensors


def write(folder: Path, state: Mapping[str, Any]) -> None:
    """Write nested dictionaries and lists of numbers, strings, None and tensors."""
    tensors: dict[str, Tensor] = {}
    plain = _without_tensors(state, "state", tensors)
    (folder / "state.json").write_text(json.dumps(plain, indent=1), "utf-8")
    save_file(tensors, folder / "state.safetensors")


def read(folder: Path) -> dict[str, Any]:
    """What `write` wrote."""
    return _with_tensors(
        json.loads((folder / "state.json").read_text("utf-8")), load_file(folder / "state.safetensors")
    )


def write_random(folder: Path, rank: int) -> None:
    """Save the generators of python, numpy, torch and this rank's GPU."""
    version, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state()
    tensors = {"torch": torch.get_rng_state(), "numpy": torch.tensor(np.asarray(keys, dtype=np.int64))}
    tensors["python"] = torch.tensor(words, dtype=torch.int64)
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    plain = {"python": [version, gauss], "numpy": [int(position), int(has_gauss), float(cached)]}
    save_file(tensors, folder / f"random-{rank:05d}.safetensors", {"plain": json.dumps(plain)})


def restore_random(folder: Path, rank: int) -> None:
    """Undo `write_random`. A rank that the saving run did not have keeps its freshly seeded generators."""
    path = folder / f"random-{rank:05d}.safetensors"
    if not path.exists():
        return
    with safe_open(path, "pt") as file:
        plain = json.loads(file.metadata()["plain"])
    tensors = load_file(path)
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
    version, gauss = plain["python"]
    random.setstate((version, tuple(tensors["python"].tolist()), gauss))
    np.random.set_state(("MT19937", tensors["numpy"].numpy().astype(np.uint32), *plain["numpy"]))


def seed_random(seed: int, rank: int) -> None:
    """Seed every generator differently on every rank."""
    torch.manual_seed(seed * 100_003 + rank)
    np.random.seed((seed * 100_003 + rank) % 2**32)
    random.seed(seed * 100_003 + rank)


def _without_tensors(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[path] = value.detach().cpu().contiguous()
        return {TENSOR: path}
    if isinstance(value, Mapping):
        return {str(key): _without_tensors(item, f"{path}.{key}", tensors) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_tensors(item, f"{path}.{index}", tensors) for index, item in enumerate(value)]
    assert value is None or isinstance(value, bool | int | float | str), f"{path}: {type(value)} is not plain state"
    return value


def _with_tensors(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, Mapping):
        if TENSOR in value:
            return tensors[value[TENSOR]]
        return {key: _with_tensors(item, tensors) for key, item in value.items()}
    return [_with_tensors(item, tensors) for item in value] if isinstance(value, list) else value
