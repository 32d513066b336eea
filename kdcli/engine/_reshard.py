"""A checkpoint of one world size and ZeRO stage, read by another: whole tensors per parameter in between.

`to_whole` writes DeepSpeed's universal layout, `zero/NAME/{fp32,exp_avg,exp_avg_sq}.pt`; `from_whole` reads it
into an engine of any stage. (DeepSpeed's own reader knows neither stage 0 nor a change between 2 and 3, and at
stage 3 gives every parameter group the settings of the first.)
"""

from __future__ import annotations

import contextlib
import io
import math
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdcli.errors import ConfigError

MOMENTS = ("exp_avg", "exp_avg_sq")


def to_whole(shards: Path, whole: Path) -> None:
    """Join the shards of a checkpoint. Raises ConfigError unless its optimizer keeps Adam's two moments."""
    try:
        if any(shards.glob("*_optim_states.pt")):
            _join(shards, whole)
        else:
            _split(shards, whole)
    except KeyError as error:
        raise ConfigError(
            f"{shards}: only optimizers with Adam's two moments can continue with another number of processes or "
            f"ZeRO stage (no {error}); use the settings of the run that saved it"
        ) from error


def from_whole(engine: Any, stage: int, whole: Path) -> None:
    """Fill a fresh DeepSpeed engine with parameters, moments and their step. A collective."""
    state = model_state(whole)
    step = torch.tensor(float(state["global_steps"] - state["skipped_steps"]))
    names: dict[Any, str] = engine.param_names
    {0: _fill_replicated, 1: _fill_flat, 2: _fill_flat, 3: _fill_partitioned}[stage](engine, names, whole, step)


def model_state(folder: Path) -> dict[str, Any]:
    """What rank 0 saved beside the shards."""
    path = next(folder.glob("mp_rank_*_model_states.pt"), None) or min(folder.glob("*_model_states.pt"))
    return torch.load(path, map_location="cpu", weights_only=True)


def _join(shards: Path, whole: Path) -> None:
    from deepspeed.checkpoint import ds_to_universal

    arguments = Namespace(
        input_folder=str(shards),
        output_folder=str(whole),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        ds_to_universal.main(arguments)


def _split(shards: Path, whole: Path) -> None:
    """Stage 0: one file holds the module and a torch optimizer, whose state is numbered in group order."""
    state = model_state(shards)
    numbers = [n for group in state["optimizer"]["param_groups"] for n in group["params"]]
    for number, name in zip(numbers, state["kdcli_order"], strict=True):
        folder = whole / "zero" / name
        folder.mkdir(parents=True)
        torch.save({"param": state["module"][name].float()}, folder / "fp32.pt")
        for key in MOMENTS:
            torch.save({"param": state["optimizer"]["state"][number][key]}, folder / f"{key}.pt")
    torch.save(
        {key: state[key] for key in ("global_steps", "skipped_steps", "lr_scheduler")},
        whole / "mp_rank_00_model_states.pt",
    )


def _read(whole: Path, name: str, key: str) -> Tensor:
    """The whole tensor, flat, without the padding of its shards."""
    value = torch.load(whole / "zero" / name / f"{key}.pt", map_location="cpu", weights_only=True)
    return (value["param"] if isinstance(value, dict) else value).flatten()


def _fill_replicated(engine: Any, names: dict[Any, str], whole: Path, step: Tensor) -> None:
    for group in engine.optimizer.param_groups:
        for p in group["params"]:
            p.data.copy_(_read(whole, names[p], "fp32")[: p.numel()].view_as(p))
            moments = {key: _read(whole, names[p], key)[: p.numel()].view_as(p).to(p.device) for key in MOMENTS}
            engine.optimizer.state[p] = {"step": step.clone(), **moments}


def _fill_flat(engine: Any, names: dict[Any, str], whole: Path, step: Tensor) -> None:
    """Stages 1 and 2: per group one flat 32-bit tensor, cut evenly among ranks; a parameter may span two."""
    zero = engine.optimizer
    for flat, parameters in zip(zero.single_partition_of_fp32_groups, zero.bit16_groups, strict=True):
        filled = {key: torch.zeros_like(flat) for key in MOMENTS}
        for p in parameters:
            if p._hp_mapping is None:  # none of it lies on this rank
                continue
            here, there = p._hp_mapping.hp_fragment_address, p._hp_mapping.lp_fragment_address
            for key, target in (("fp32", flat.data), *filled.items()):
                piece = _read(whole, names[p], key).narrow(0, there.start, there.numel)
                target.narrow(0, here.start, here.numel).copy_(piece)
        zero.optimizer.state[flat] = {"step": step.clone(), **filled}
    zero.update_lp_params()


def _fill_partitioned(engine: Any, names: dict[Any, str], whole: Path, step: Tensor) -> None:
    """Stage 3: every parameter is cut among ranks by itself, padded to equal parts."""
    zero = engine.optimizer
    zero.checkpoint_event_prologue()
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    for index, (flat, parameters) in enumerate(zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True)):
        filled = {"fp32": flat.data, **{key: torch.zeros_like(flat) for key in MOMENTS}}
        offset = 0
        for p in parameters:
            size = math.ceil(p.ds_numel / world_size)
            for key, target in filled.items():
                piece = _read(whole, names[p], key)[: p.ds_numel][rank * size : (rank + 1) * size]
                target[offset : offset + len(piece)].copy_(piece)
            offset += size
        zero.optimizer.state[flat] = {"step": step.clone(), **{key: filled[key] for key in MOMENTS}}
        if (half := zero.fp16_partitioned_groups_flat[index]) is not None:
            half.data.copy_(flat.data)
            for part, value in zip(
                zero.fp16_partitioned_groups[index],
                zero.unflatten(half, zero.fp16_partitioned_groups[index]),
                strict=True,
            ):
                part.data = value.data
    if zero.persistent_parameters:
        zero.persistent_parameters[0].partition(zero.persistent_parameters)
    zero.checkpoint_event_epilogue()
