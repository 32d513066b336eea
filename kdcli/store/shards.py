"""A model's weights on their way to disk: one after the other, adapters merged, in safetensors shards written as they
are filled."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

LIMIT = 5 * 10**9  # bytes of a shard, as transformers cut them for years: hosts and loaders are used to it
CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
ENTRY = 160  # bytes that a tensor's type, shape and offsets take in a header, at most, beside its name
ADAPTER = "default"  # the name that peft gives an adapter


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A weight of the exported model, and what of the trained one it is made of.

    With an adapter W' = W + scaling * up @ down (LoRA, arXiv:2106.09685); with a magnitude m too, each output's row of
    W' is then brought to the length m (DoRA, arXiv:2402.09353).
    """

    name: str  # in the exported model
    base: str  # in the trained one: [out, in], or [in, out] if `transposed`
    down: str | None = None  # [rank, in]
    up: str | None = None  # [out, rank]
    magnitude: str | None = None  # [out]
    scaling: float = 1.0
    transposed: bool = False

    @property
    def sources(self) -> list[str]:
        """Names of what it is made of."""
        return [name for name in (self.base, self.down, self.up, self.magnitude) if name is not None]

    def made_of(self, tensors: Sequence[Tensor]) -> Tensor:
        """The weight, from `sources`; merged in float32."""
        base, *rest = tensors
        if self.down is None:
            return base
        weight = (base.T if self.transposed else base).float()
        weight = torch.addmm(weight, rest[1].float(), rest[0].float(), alpha=self.scaling)
        if self.magnitude is not None:
            weight *= (rest[2].float() / weight.norm(dim=1))[:, None]
        return weight.T if self.transposed else weight


def weights_of(model: Any) -> list[Weight]:
    """What a transformers model exports, in its own order: each parameter and saved buffer once, whatever ties it."""
    adapted = {name: layer for name, layer in model.named_modules() if hasattr(layer, "lora_magnitude_vector")}
    kept = model.state_dict(keep_vars=True)
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    found: list[Weight] = []
    seen: set[int] = set()
    for name in [*dict(model.named_parameters(remove_duplicate=False)), *dict(model.named_buffers())]:
        tensor = kept.get(name)
        if not isinstance(tensor, Tensor) or id(tensor) in seen or name in ignored:
            continue
        seen.add(id(tensor))
        owner = next((place for place in _parents(name) if place in adapted), None)
        if owner is None:
            found.append(Weight(name=name, base=name))
        elif name.startswith(f"{owner}.base_layer."):
            plain = f"{owner}.{name.removeprefix(f'{owner}.base_layer.')}"
            main = plain == f"{owner}.weight"
            found.append(_merged(plain, name, owner, adapted[owner]) if main else Weight(name=plain, base=name))
    return found


def adapter_names(model: Any) -> dict[str, str]:
    """What of a model learned, by its name in peft's files -> in the model; nothing where there is no adapter."""
    names = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or ".lora_" in name:
            plain = name.replace(".base_layer.", ".").replace(f".{ADAPTER}", "")
            plain = plain.removesuffix(".weight") if ".lora_magnitude_vector" in name else plain
            names[f"base_model.model.{plain}"] = name
    return names if any(".lora_" in name for name in names) else {}


def value_of(tensor: Tensor) -> Tensor:
    """A tensor to read: of a weight that bitsandbytes holds in 4 bits, what it stands for."""
    if not is_quantized(tensor):
        return tensor.detach()
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(tensor.detach(), tensor.quant_state)  # type: ignore[attr-defined]


def dequantized(name: str, source: Mapping[str, Callable[[], Tensor]]) -> Tensor:
    """A saved tensor by name, or what it stands for where beside it lies how bitsandbytes cut it to 4 bits."""
    kept = {key.removeprefix(f"{name}."): read for key, read in source.items() if key.startswith(f"{name}.")}
    if not any(key.startswith("quant_state.") for key in kept):
        return source[name]()
    from bitsandbytes.functional import QuantState, dequantize_4bit

    state = QuantState.from_dict({key: read() for key, read in kept.items()}, device=torch.device("cpu"))
    return dequantize_4bit(source[name](), state)


def is_quantized(tensor: Any) -> bool:
    """Whether bitsandbytes holds a parameter in 4 bits."""
    return getattr(tensor, "quant_state", None) is not None


class Shards:
    """Writes `model.safetensors` into `folder`, or `model-0000x-of-0000y.safetensors` and their index once `limit`
    bytes are passed. Tensors go to disk as they are added: nothing is kept in memory.

    The format puts names, types and places of the tensors in front of them, so room for those of `names` is left there
    and filled when the shard is complete; what remains is blank, which the format allows.
    """

    def __init__(self, folder: Path, names: Iterable[str], *, limit: float = LIMIT, stem: str = "model") -> None:
        self.folder = folder
        self.stem = stem
        self.limit = limit
        self.header = _rounded(64 + sum(map(_told, names)))  # bytes
        self.total = 0  # bytes of tensors
        self._files: list[Path] = []
        self._map: dict[str, int] = {}  # name -> index of the shard
        self._file: BinaryIO | None = None
        self._entries: dict[str, dict[str, Any]] = {}
        self._size = 0
        self._told = 0  # bytes of the header that are spoken for

    def add(self, name: str, tensor: Tensor) -> None:
        """Write one tensor. A tensor is never cut, so a shard may be larger than `limit`."""
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu()
        full = self._size + flat.numel() > self.limit or self._told + _told(name) > self.header
        if self._file is None or full:
            self._end_shard()
            self._begin_shard(name)
        assert self._file is not None, "a shard is open"
        self._file.write(flat.numpy().data)
        place = [self._size, self._size + flat.numel()]
        self._entries[name] = {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": place}
        self._map[name] = len(self._files) - 1
        self._size, self._told, self.total = place[1], self._told + _told(name), self.total + flat.numel()

    def close(self) -> None:
        """Finish the last shard, name the shards, and write the index where there are several."""
        self._end_shard()
        if len(self._files) == 1:
            os.replace(self._files[0], self.folder / f"{self.stem}.safetensors")
            return
        count = len(self._files)
        names = [f"{self.stem}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
        for file, final in zip(self._files, names, strict=True):
            os.replace(file, self.folder / final)
        index = {"metadata": {"total_size": self.total}, "weight_map": {k: names[i] for k, i in self._map.items()}}
        (self.folder / f"{self.stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")

    def _begin_shard(self, name: str) -> None:
        self.header = max(self.header, _rounded(64 + _told(name)))
        self._files.append(self.folder / f".{self.stem}-{len(self._files)}.tmp")
        self._file = open(self._files[-1], "wb")  # noqa: SIM115 - closed by `_end_shard`
        self._file.write(b" " * (8 + self.header))
        self._entries, self._size, self._told = {}, 0, 64

    def _end_shard(self) -> None:
        if self._file is None:
            return
        content: Mapping[str, Any] = {"__metadata__": {"format": "pt"}, **self._entries}
        told = json.dumps(content, separators=(",", ":")).encode()
        assert len(told) <= self.header, f"{len(told)} bytes of header in {self.header}"
        self._file.seek(0)
        self._file.write(self.header.to_bytes(8, "little") + told)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None


def _merged(name: str, base: str, owner: str, layer: Any) -> Weight:
    """The weight of a linear layer with its adapter in it."""
    magnitude = f"{owner}.lora_magnitude_vector.{ADAPTER}.weight" if ADAPTER in layer.lora_magnitude_vector else None
    return Weight(
        name=name,
        base=base,
        down=f"{owner}.lora_A.{ADAPTER}.weight",
        up=f"{owner}.lora_B.{ADAPTER}.weight",
        magnitude=magnitude,
        scaling=float(layer.scaling[ADAPTER]),
        transposed=bool(layer.fan_in_fan_out),
    )


def _parents(name: str) -> list[str]:
    """`a.b.c` -> `a.b`, `a`."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1)]


def _told(name: str) -> int:
    """Bytes of a header that a tensor takes, at most."""
    return len(json.dumps(name)) + ENTRY


def _rounded(size: int) -> int:
    """The next multiple of 64: tensors begin where processors like to read."""
    return -(-size // 64) * 64
