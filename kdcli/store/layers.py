"""What the layers of a transformers causal language model compute, in one pass, and the numbers of its shape.

Layer i of L is the i-th block, counted from 1; 0 is the embedding. Letters: L layers, W width of a projection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from kdcli.api import ModelShape, Need, Relations
from kdcli.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Layers:
    """What one pass computed; what was not asked for is None.

    `hidden_states[i]` is what layer i hands on, except the last: it is after the model's final norm, so equal to
    `hidden`, which the head reads (transformers' own convention).
    """

    hidden: Tensor  # [B, T, D] before the head
    hidden_states: tuple[Tensor, ...] | None = None  # L + 1 of [B, T, D]
    attentions: tuple[Tensor, ...] | None = None  # L of [B, H, T, T], after dropout if the model has any and trains
    relations: tuple[Relations, ...] | None = None  # L


def provides(attention: str | None) -> Need:
    """What `run` can give of HIDDEN, ATTENTION and RELATIONS: probabilities exist under eager attention only."""
    return Need.HIDDEN | Need.RELATIONS | (Need.ATTENTION if attention == "eager" else Need.NOTHING)


def run(model: Any, inputs: dict[str, Any], needs: Need) -> Layers:
    """One pass of the model without its head. Raises ConfigError for what this model cannot show."""
    asked: dict[str, bool] = {}
    if Need.HIDDEN in needs:
        asked["output_hidden_states"] = True
    if Need.ATTENTION in needs:
        _require_eager(model)
        asked["output_attentions"] = True
    projections = _projections(model) if Need.RELATIONS in needs else []
    with _caught(projections) as outputs:
        ran = model.base_model(**inputs, **asked)
    hidden = ran.last_hidden_state
    lost = hidden.requires_grad and not all(one.requires_grad for one in outputs)
    if lost and any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise ConfigError(
            "engine.activation_checkpointing: this model recomputes its layers in a way that hides their queries, keys "
            "and values from the loss; set engine.activation_checkpointing=false"
        )
    depth = model.config.get_text_config().num_hidden_layers
    for name, count in (("hidden_states", depth + 1), ("attentions", depth)):
        found = getattr(ran, name, None)
        if asked.get(f"output_{name}") and (found is None or [one is not None for one in found] != [True] * count):
            raise ConfigError(
                f"{type(model).__name__} does not show the {name.replace('_', ' ')} of its {depth} layers; "
                "choose an objective that needs none"
            )
    return Layers(
        hidden=hidden,
        hidden_states=tuple(ran.hidden_states) if Need.HIDDEN in needs else None,
        attentions=tuple(ran.attentions) if Need.ATTENTION in needs else None,
        relations=_relations(projections, outputs) if projections else None,
    )


def shape_of(config: Any, vocab_size: int) -> ModelShape:
    """The shape that a transformers config describes; `vocab_size` real ids, at most the embedding's rows."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    return ModelShape(
        layers=text.num_hidden_layers,
        width=text.hidden_size,
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_width=getattr(text, "head_dim", None) or text.hidden_size // heads,
        vocab_size=min(vocab_size, text.vocab_size),
    )


def stack(model: Any) -> tuple[str, nn.ModuleList]:
    """The list of layers and its name, such as `model.layers`. Raises ConfigError where there is none."""
    total = model.config.get_text_config().num_hidden_layers
    decoder = {id(module) for module in model.get_decoder().modules()}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == total and id(module) in decoder:
            return name, module
    raise ConfigError(f"{type(model).__name__} has no list of {total} layers, so none can be named")


# -------------------------------------------------------------------------------------- queries, keys and values

Split = Callable[[Tensor, ModelShape], tuple[Tensor, Tensor, Tensor]]  # [B, T, W] -> three of [B, T, H W']


def _by_kind(fused: Tensor, shape: ModelShape) -> tuple[Tensor, Tensor, Tensor]:
    """All queries, then all keys, then all values."""
    queries, keys = shape.heads * shape.head_width, shape.kv_heads * shape.head_width
    one, two, three = fused.split([queries, keys, keys], dim=-1)
    return one, two, three


def _by_head(fused: Tensor, shape: ModelShape) -> tuple[Tensor, Tensor, Tensor]:
    """The query, key and value of the first head, then of the second, …"""
    one, two, three = fused.unflatten(-1, (shape.heads, 3, shape.head_width)).unbind(-2)
    return one.flatten(-2), two.flatten(-2), three.flatten(-2)


APART = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),  # BERT and what follows it
    ("q_lin", "k_lin", "v_lin"),  # DistilBERT
    ("query_proj", "key_proj", "value_proj"),  # DeBERTa
)
FUSED: dict[tuple[str, str], Split] = {  # model type and projection -> how it is laid out
    ("gpt2", "c_attn"): _by_kind,
    ("phi3", "qkv_proj"): _by_kind,
    ("gpt_neox", "query_key_value"): _by_head,
}


@dataclass(frozen=True)
class _Projection:
    """Where a layer makes its queries, keys and values: three modules, or one and how to cut its output."""

    modules: tuple[nn.Module, ...]
    shape: ModelShape
    split: Split | None = None


def _projections(model: Any) -> list[_Projection]:
    """One per layer. Raises ConfigError where a layer has none that is known."""
    config = model.config.get_text_config()
    shape = shape_of(config, config.vocab_size)
    found = [
        [p for module in layer.modules() if (p := _projection(module, config, shape))] for layer in stack(model)[1]
    ]
    if any(len(one) != 1 for one in found):
        fused = ", ".join(f"{name} of {kind}" for kind, name in FUSED)
        raise ConfigError(
            f"{type(model).__name__}: layer {1 + next(i for i, one in enumerate(found) if len(one) != 1)} has no known "
            f"queries, keys and values (known are {', '.join(', '.join(names) for names in APART)}, and {fused}); "
            "choose an objective that compares hidden states, such as hidden_mse"
        )
    return [one[0] for one in found]


def _projection(module: nn.Module, config: Any, shape: ModelShape) -> _Projection | None:
    for names in APART:
        apart = tuple(one for name in names if isinstance(one := getattr(module, name, None), nn.Module))
        if len(apart) == len(names):
            return _Projection(apart, shape)
    for (kind, name), split in FUSED.items():
        one = getattr(module, name, None)
        if config.model_type == kind and isinstance(one, nn.Module):
            return _Projection((one,), shape, split)
    return None


@contextmanager
def _caught(projections: list[_Projection]) -> Iterator[list[Tensor]]:
    """The outputs of the projections' modules, in order, once the model has run.

    The hooks are the modules' last, so they see what an engine that shards parameters makes of an output: its
    backward brings the module's weight back.
    """
    modules = [module for projection in projections for module in projection.modules]
    outputs: list[Any] = [None] * len(modules)

    def keep(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, given: Any, output: Tensor) -> None:
            outputs[index] = output

        return hook

    handles = [module.register_forward_hook(keep(i)) for i, module in enumerate(modules)]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _relations(projections: list[_Projection], outputs: list[Tensor]) -> tuple[Relations, ...]:
    """As projected: before rotation, and before the norm that some models apply to each head's queries and keys."""
    given, relations = iter(outputs), []
    for projection in projections:
        shape, parts = projection.shape, [next(given) for _ in projection.modules]
        queries, keys, values = projection.split(parts[0], shape) if projection.split else parts
        expected = shape.heads * shape.head_width, shape.kv_heads * shape.head_width
        if (queries.shape[-1], keys.shape[-1]) != expected:
            raise ConfigError(
                f"the model's queries and keys are {queries.shape[-1]} and {keys.shape[-1]} wide, but its config says "
                f"{expected[0]} and {expected[1]}: their layout is not known; choose an objective that compares hidden "
                "states, such as hidden_mse"
            )
        cut = [part.unflatten(-1, (-1, shape.head_width)) for part in (queries, keys, values)]
        relations.append(Relations(queries=cut[0], keys=cut[1], values=cut[2]))
    return tuple(relations)


def _require_eager(model: Any) -> None:
    used = model.config.get_text_config()._attn_implementation
    if used != "eager":
        raise ConfigError(
            f"attention probabilities exist under eager attention only, and this model runs {used}; set "
            "teacher.attention=eager and student.attention=eager"
        )
