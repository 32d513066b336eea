"""Narrower models: the units that activations show to matter, and the weights between them: Minitron, arXiv:2407.14679.

Letters as in `_units`; N tokens.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from kdcli.api import Batch
from kdcli.store.layers import stack
from kdcli.student_init._calibrate import evaluating
from kdcli.student_init._surgery import rebuilt
from kdcli.student_init._units import Weight, Widths, norms, weights

Aggregate = Literal["mean", "l2"]
Scaling = Literal["norms", "fan_in"]
Place = TypeVar("Place")


class Read(StrEnum):
    """The projections before which activations are read."""

    attention = "self_attn.q_proj"
    gate = "mlp.gate_proj"
    heads = "self_attn.o_proj"
    ffn = "mlp.down_proj"


@dataclass
class Activity:
    """How active each unit is on calibration data."""

    hidden: Tensor  # [D]
    heads: list[Tensor]  # per layer [H]
    ffn: list[Tensor]  # per layer [F]


@dataclass
class Kept:
    """Which units stay, each list ascending."""

    hidden: Tensor
    heads: list[Tensor]  # per layer, group by group
    kv_heads: list[Tensor]  # per layer
    ffn: list[Tensor]  # per layer


def narrowed(
    source: Any,
    kept: Kept,
    widths: Widths,
    rows: Sequence[Batch],
    *,
    scaling: Scaling,
    dtype: str,
    attention: str | None = None,
) -> Any:
    """A new model with the kept units, `widths` of them. `scaling` is what makes up for those that have gone.

    norms: an RMSNorm divides by the root mean square over fewer units, so its weight is multiplied by the mean ratio,
    over the tokens of `rows`, of the root mean square over the kept units to that over all. Where the others are 0
    nothing changes.
    fan_in: a sum of d_s of d_t terms has sqrt(d_s / d_t) of its spread, so each projection is multiplied by
    sqrt(d_t / d_s) of what goes in, and the last norm by that of the head (weight subcloning, arXiv:2312.09299).
    """
    old = Widths.of(source.config)
    factors = _fan_in_factors(source, old, widths)
    if scaling == "norms":
        factors = _norm_factors(source, kept, rows) if widths.hidden < old.hidden else {}
    for name, factor in _output_factors(source, old, widths).items():
        factors[name] = factors.get(name, 1.0) * factor
    state, whole = {}, source.state_dict()
    for weight in weights(source):
        value = _selected(whole[weight.name], weight, kept, old.head_width)
        state[weight.name] = _scaled(value, factors.get(weight.name, 1.0), _offset(source, weight))
    return rebuilt(source, _narrow_config(source.config, widths), state, dtype=dtype, attention=attention)


def activity(model: Any, rows: Sequence[Batch], aggregate: Aggregate) -> Activity:
    """Over all tokens the mean of |activation|, or (l2) the root of the mean of its square.

    Hidden units are read where projections read them, behind the norms, and averaged over layers; FFN units before
    the last projection; of a head the norm of its output is the activation.
    """
    widths, means = Widths.of(model.config), {}
    modules = {(part, i): layer.get_submodule(part) for i, layer in enumerate(stack(model)[1]) for part in Read}

    def see(place: tuple[str, int], tokens: Tensor) -> None:
        if place[0] == Read.heads:
            tokens = tokens.unflatten(-1, (-1, widths.head_width)).norm(dim=-1)
        means.setdefault(place, _Mean()).add(tokens.abs() if aggregate == "mean" else tokens.square())

    _read(model, modules, rows, see)
    finish: Callable[[Tensor], Tensor] = torch.sqrt if aggregate == "l2" else torch.clone
    values = {part: [finish(mean.value()) for place, mean in means.items() if place[0] == part] for part in Read}
    return Activity(
        hidden=torch.stack(values[Read.attention] + values[Read.gate]).mean(dim=0),
        heads=values[Read.heads],
        ffn=values[Read.ffn],
    )


def chosen(active: Activity, old: Widths, new: Widths) -> Kept:
    """The most active units. Groups of heads stay or go whole by the sum of the heads that would stay, and each keeps
    equally many."""
    heads, groups = [], []
    each = new.heads // new.kv_heads
    for scores in active.heads:
        grouped = scores.view(old.kv_heads, -1)  # [H', H / H']
        group = _top(grouped.topk(each).values.sum(dim=-1), new.kv_heads)
        size = grouped.shape[1]
        heads.append(torch.cat([one * size + _top(grouped[one], each) for one in group]))
        groups.append(group)
    ffn = [_top(scores, new.ffn) for scores in active.ffn]
    return Kept(hidden=_top(active.hidden, new.hidden), heads=heads, kv_heads=groups, ffn=ffn)


def _read(
    model: Any, modules: Mapping[Place, nn.Module], rows: Sequence[Batch], see: Callable[[Place, Tensor], None]
) -> None:
    """Call `see` with the tokens that enter each module, [N, .] float64, of every batch."""
    batch: list[Batch] = []

    def hook(place: Place, _: nn.Module, given: tuple[Tensor, ...]) -> None:
        see(place, given[0][batch[-1].attention_mask].double())

    with ExitStack() as hooks, evaluating(model):
        for place, module in modules.items():
            hooks.callback(module.register_forward_pre_hook(partial(hook, place)).remove)
        for one in rows:
            batch.append(one)
            model.base_model(**one.model_inputs())


@dataclass
class _Mean:
    total: Tensor | None = None
    tokens: int = 0

    def add(self, values: Tensor) -> None:
        """[N, .]"""
        self.total = values.sum(dim=0) if self.total is None else self.total + values.sum(dim=0)
        self.tokens += values.shape[0]

    def value(self) -> Tensor:
        assert self.total is not None, "nothing was added"
        return (self.total / self.tokens).cpu()


def _top(scores: Tensor, number: int) -> Tensor:
    """The indices of the highest scores, ascending; of equal ones the first."""
    return scores.sort(descending=True, stable=True).indices[:number].sort().values


def _selected(value: Tensor, weight: Weight, kept: Kept, head_width: int) -> Tensor:
    """A copy with only the kept units of each axis."""
    value = value.detach()
    for dim, axis in enumerate(weight.axes):
        if axis == "hidden":
            index = kept.hidden
        elif axis == "ffn":
            index = kept.ffn[_in_layer(weight)]
        elif axis in ("queries", "keys"):
            heads = (kept.heads if axis == "queries" else kept.kv_heads)[_in_layer(weight)]
            index = (heads[:, None] * head_width + torch.arange(head_width)).flatten()
        else:
            continue
        value = value.index_select(dim, index.to(value.device))
    return value.clone()


def _in_layer(weight: Weight) -> int:
    assert weight.layer is not None, f"{weight.name} is of no layer"
    return weight.layer


def _scaled(value: Tensor, factor: float, offset: float) -> Tensor:
    if factor == 1.0:
        return value
    return (value.double() + offset) * factor - offset


def _offset(model: Any, weight: Weight) -> float:
    """1.0 of a norm that multiplies by 1 + its weight (Gemma), else 0.0."""
    module = model.get_submodule(weight.module)
    if "RMSNorm" not in type(module).__name__:
        return 0.0
    with torch.no_grad():
        ones = torch.ones(1, module.weight.shape[0], dtype=torch.float32, device=module.weight.device)
        return float(round(float((module(ones).float() - module.weight.float()).mean())))


def _norm_factors(model: Any, kept: Kept, rows: Sequence[Batch]) -> dict[str, float]:
    """Per norm the mean ratio of the root mean square over the kept units to that over all."""
    modules, index = norms(model), kept.hidden.to(model.device)
    means = {name: _Mean() for name in modules}

    def see(name: str, tokens: Tensor) -> None:
        epsilon = getattr(modules[name], "variance_epsilon", getattr(modules[name], "eps", 0.0))
        squares = tokens.square()
        ratio = (squares[:, index].mean(dim=-1) + epsilon) / (squares.mean(dim=-1) + epsilon)
        means[name].add(ratio.sqrt()[:, None])

    _read(model, modules, rows, see)
    return {f"{name}.weight": float(mean.value()) for name, mean in means.items()}


def _fan_in_factors(model: Any, old: Widths, new: Widths) -> dict[str, float]:
    """sqrt(d_t / d_s) of what goes into each projection; the head's is the last norm's, which tied weights allow."""
    head = math.sqrt(old.hidden / new.hidden)
    factors = {}
    for weight in weights(model):
        if weight.layer is not None and len(weight.axes) == 2:
            before, after = old.length(weight.axes[1]), new.length(weight.axes[1])
            assert before is not None, f"{weight.name} has no units that go in"
            assert after is not None, f"{weight.name} has no units that go in"
            factors[weight.name] = math.sqrt(before / after)
        elif weight.layer is None and weight.axes == ("hidden",):
            factors[weight.name] = head
    return factors


def _output_factors(model: Any, old: Widths, new: Widths) -> dict[str, float]:
    """Gemma multiplies embeddings by sqrt(D), so fewer units make them smaller: what layers add to them follows suit,
    which norms do not see."""
    scale = getattr(model.get_input_embeddings(), "scalar_embed_scale", 1.0)
    if old.hidden == new.hidden or not math.isclose(scale, math.sqrt(old.hidden), rel_tol=1e-3):
        return {}
    shrunk = math.sqrt(new.hidden / old.hidden)
    names = {weight.name for weight in weights(model) if weight.layer is not None}
    sandwiched = any("pre_feedforward_layernorm" in name for name in names)
    last = ("post_attention_layernorm.", "post_feedforward_layernorm.") if sandwiched else ("o_proj.", "down_proj.")
    return {name: shrunk for name in names if any(f".{part}" in name for part in last)}


def _narrow_config(config: Any, widths: Widths) -> Any:
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.hidden_size, text.intermediate_size = widths.hidden, widths.ffn
    text.num_attention_heads, text.num_key_value_heads = widths.heads, widths.kv_heads
    text.head_dim = widths.head_width  # else it would be hidden_size / heads
    return config
