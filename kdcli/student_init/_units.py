"""The units of a Llama-like model: which axis of which weight counts hidden units, heads, groups or FFN units.

Letters: D hidden units, H query heads, H' groups (key and value heads), F units of the feed-forward network. A head is
d wide.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kdcli.errors import ConfigError
from kdcli.store.layers import shape_of, stack

Axis = Literal["hidden", "queries", "keys", "ffn", "whole"]
WIDTHS = ("hidden", "ffn", "heads", "kv_heads")

_PROJECTIONS: dict[str, tuple[Axis, Axis]] = {  # (what comes out, what goes in)
    "self_attn.q_proj": ("queries", "hidden"),
    "self_attn.k_proj": ("keys", "hidden"),
    "self_attn.v_proj": ("keys", "hidden"),
    "self_attn.o_proj": ("hidden", "queries"),
    "mlp.gate_proj": ("ffn", "hidden"),
    "mlp.up_proj": ("ffn", "hidden"),
    "mlp.down_proj": ("hidden", "ffn"),
}
_NORMS = re.compile(r"(input|post_attention|(pre|post)_feedforward)_layernorm")


@dataclass(frozen=True, kw_only=True)
class Widths:
    """How many units there are of each kind."""

    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_width: int

    @classmethod
    def of(cls, config: Any) -> Widths:
        text, shape = config.get_text_config(), shape_of(config, config.get_text_config().vocab_size)
        ffn = getattr(text, "intermediate_size", None)
        if not isinstance(ffn, int):
            raise _unknown(config.model_type, "no one intermediate_size")
        return cls(hidden=shape.width, ffn=ffn, heads=shape.heads, kv_heads=shape.kv_heads, head_width=shape.head_width)

    def length(self, axis: Axis) -> int | None:
        """Of an axis; None: any."""
        lengths = {
            "hidden": self.hidden,
            "ffn": self.ffn,
            "queries": self.heads * self.head_width,
            "keys": self.kv_heads * self.head_width,
        }
        return lengths.get(axis)

    def narrowed(
        self,
        *,
        hidden: int | None = None,
        ffn: int | None = None,
        heads: int | None = None,
        kv_heads: int | None = None,
    ) -> Widths:
        """The widths asked for; None leaves one as it is, but heads and groups go together.

        Raises ConfigError for more than there are, and for heads that do not divide into groups.
        """
        asked = {"hidden": hidden, "ffn": ffn, "heads": heads, "kv_heads": kv_heads}
        for name, value in asked.items():
            if value is not None and not 1 <= value <= getattr(self, name):
                raise ConfigError(
                    f"student_init.{name} is {value}; the model has {getattr(self, name)}, so give 1 to "
                    f"{getattr(self, name)}"
                )
        each = self.heads // self.kv_heads
        if kv_heads is None:
            kv_heads = self.kv_heads if each > 1 or heads is None else heads
        heads = each * kv_heads if heads is None else heads
        if heads % kv_heads or heads > each * kv_heads:
            raise ConfigError(
                f"student_init: {heads} heads in {kv_heads} groups of equal size cannot be cut from {self.heads} in "
                f"{self.kv_heads}: groups have {each}; set student_init.heads to kv_heads times 1 to {each}"
            )
        return Widths(
            hidden=hidden or self.hidden,
            ffn=ffn or self.ffn,
            heads=heads,
            kv_heads=kv_heads,
            head_width=self.head_width,
        )


@dataclass(frozen=True)
class Weight:
    """A weight of the state, the layer it is of (None: of none), and what its axes count."""

    name: str
    layer: int | None
    axes: tuple[Axis, ...]

    @property
    def module(self) -> str:
        return self.name.rpartition(".")[0]


def weights(model: Any) -> Iterator[Weight]:
    """Every weight of the state. Raises ConfigError for one whose units are not known."""
    widths, prefix = Widths.of(model.config), stack(model)[0] + "."
    for name, value in model.state_dict().items():
        layer, local = None, name
        if name.startswith(prefix):
            number, _, local = name.removeprefix(prefix).partition(".")
            layer = int(number)
        axes = _axes(local, value, layer is None, widths.head_width)
        lengths = [] if axes is None else [widths.length(axis) for axis in axes]
        if axes is None or any(want not in (None, have) for want, have in zip(lengths, value.shape, strict=True)):
            raise _unknown(type(model).__name__, f"a weight {name} of shape {tuple(value.shape)}")
        yield Weight(name, layer, axes)


def norms(model: Any) -> dict[str, nn.Module]:
    """The norms of the hidden units, by name. Raises ConfigError where one is no RMSNorm."""
    modules = dict(model.named_modules())
    found = {weight.module: modules[weight.module] for weight in weights(model) if weight.axes == ("hidden",)}
    found = {name: module for name, module in found.items() if not isinstance(module, nn.Linear)}
    for name, module in found.items():
        if "RMSNorm" not in type(module).__name__:
            raise _unknown(type(model).__name__, f"{name}, a {type(module).__name__} and no RMSNorm")
    return found


def check_known(config: Any) -> None:
    """Raises ConfigError where a model of this config has weights whose units are not known. Loads no weights."""
    from transformers import AutoModelForCausalLM

    if hasattr(config, "auto_map"):
        return  # of a repository's own code: seen once it is loaded
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    norms(model)


def _axes(local: str, value: Tensor, outside: bool, head_width: int) -> tuple[Axis, ...] | None:
    module, _, kind = local.rpartition(".")
    if outside:
        if module.endswith("embed_tokens") or module == "lm_head":
            return ("whole", "hidden") if value.ndim == 2 else ("whole",)
        return ("hidden",) if module.endswith("norm") and value.ndim == 1 else None
    if module in _PROJECTIONS and kind in ("weight", "bias"):
        return _PROJECTIONS[module] if kind == "weight" else _PROJECTIONS[module][:1]
    if module in ("self_attn.q_norm", "self_attn.k_norm") and value.shape == (head_width,):
        return ("whole",)
    return ("hidden",) if _NORMS.fullmatch(module) and kind == "weight" else None


def _unknown(model: str, what: str) -> ConfigError:
    return ConfigError(
        f"student_init: {model} has {what}, and how to make that narrower is not known; Llama-like models are (Llama, "
        "Mistral, Qwen2, Qwen3, Gemma); student_init=drop_layers makes any model shallower"
    )
