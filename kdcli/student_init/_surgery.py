"""New models from weights of old ones: a config and a state that describe exactly the same architecture."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kdcli.errors import ConfigError
from kdcli.store.layers import stack
from kdcli.store.models import require_complete


def rebuilt(source: Any, config: Any, state: Mapping[str, Tensor], *, dtype: str, attention: str | None) -> Any:
    """A model of the source's class with another config and state, in `dtype`, with the source's way to generate.

    Raises ConfigError if the state is not exactly the architecture's.
    """
    model, report = type(source).from_pretrained(
        None,
        config=config,
        state_dict=dict(state),
        dtype=getattr(torch, dtype),
        attn_implementation=attention,
        output_loading_info=True,
    )
    require_complete("student_init", report)
    if getattr(source, "generation_config", None) is not None:  # encoders have none
        model.generation_config = copy.deepcopy(source.generation_config)
    return model


def cut(source: Any, layers: Sequence[int], *, dtype: str = "float32", attention: str | None = None) -> Any:
    """A new model that is `source` with only `layers`, in that order; shares no memory with it.

    Raises ConfigError as `check_layers` does.
    """
    total = source.config.get_text_config().num_hidden_layers
    check_layers(layers, total)
    prefix = stack(source)[0] + "."
    model_state = ((_renumbered(name, prefix, layers), value) for name, value in source.state_dict().items())
    state = {name: value.detach().clone() for name, value in model_state if name is not None}
    return rebuilt(source, _cut_config(source.config, layers, total), state, dtype=dtype, attention=attention)


def check_layers(layers: Sequence[int], total: int) -> None:
    """Raises ConfigError if a layer is named twice or does not exist, or if none is named."""
    wrong = [layer for layer in layers if not 0 <= layer < total]
    twice = sorted({layer for layer in layers if list(layers).count(layer) > 1})
    if not layers or wrong or twice:
        problem = f"there is no layer {wrong[0]}" if wrong else f"{twice[0]} stands twice" if twice else "it is empty"
        raise ConfigError(f"student_init.layers: {problem}; name each layer to keep once, from 0 to {total - 1}")


def _renumbered(name: str, prefix: str, layers: Sequence[int]) -> str | None:
    """A weight's name in the cut model, None if its layer is left out."""
    if not name.startswith(prefix):
        return name
    number, _, rest = name.removeprefix(prefix).partition(".")
    return f"{prefix}{list(layers).index(int(number))}.{rest}" if int(number) in layers else None


def _cut_config(config: Any, layers: Sequence[int], total: int) -> Any:
    """The config with fewer layers; lists with an entry per layer (`layer_types`) are cut alike."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    for key, value in text.to_dict().items():
        if "layer" in key and isinstance(value, list) and len(value) == total:
            setattr(text, key, [value[layer] for layer in layers])
    text.num_hidden_layers = len(layers)
    return config
