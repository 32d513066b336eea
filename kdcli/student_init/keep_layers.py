"""The student is the teacher with some of its layers left out."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from kdcli.api import ModelShape, Student, StudentInit, Teacher
from kdcli.errors import ConfigError
from kdcli.store.layers import stack
from kdcli.store.models import real_ids, require_complete
from kdcli.student_init._models import size, tokenizer_of

log = logging.getLogger(__name__)


class KeepLayers(StudentInit):
    """Copy the named layers (counted from 0), the embeddings, the last norm and the head of the teacher, or of
    the student's own model where `student.path` names one.

    Which layers matter differs from model to model: leaving out every n-th ruins most.
    Raises ConfigError if a layer is named twice or does not exist, or if there is no model to cut.
    """

    def __init__(self, *, layers: Sequence[int]) -> None:
        self.layers = list(layers)

    def shape(self, student: Student, teacher: Teacher) -> ModelShape | None:
        """What is cut, with fewer layers. Raises ConfigError as the cut itself does."""
        own = student.shape()
        whole = own or teacher.shape()
        if whole is None or student.model is not None:
            return own
        _check(self.layers, whole.layers)
        size = min(whole.vocab_size, real_ids(tokenizer_of(student, teacher)))
        return replace(whole, layers=len(self.layers), vocab_size=size)

    def __call__(self, student: Student, teacher: Teacher) -> None:
        source = student.model if student.model is not None else getattr(teacher, "model", None)
        if source is None:
            raise ConfigError("student_init=keep_layers needs a model to cut: set teacher=hf, or student.path")
        model = cut(source, self.layers, dtype=student.dtype, attention=student.attention)
        log.info("student: %s, cut from %s", size(model), size(source))
        student.adopt(model, tokenizer_of(student, teacher))


def cut(source: Any, layers: Sequence[int], *, dtype: str = "float32", attention: str | None = None) -> Any:
    """A new model that is `source` with only `layers`, in that order; shares no memory with it.

    Raises ConfigError as KeepLayers does.
    """
    total = source.config.get_text_config().num_hidden_layers
    _check(layers, total)
    prefix = stack(source)[0] + "."
    model_state = ((_renumbered(name, prefix, layers), value) for name, value in source.state_dict().items())
    state = {name: value.detach().clone() for name, value in model_state if name is not None}
    config = _cut_config(source.config, layers, total)
    model, report = type(source).from_pretrained(
        None,
        config=config,
        state_dict=state,
        dtype=getattr(torch, dtype),
        attn_implementation=attention,
        output_loading_info=True,
    )
    require_complete("student_init.layers", report)
    model.generation_config = copy.deepcopy(source.generation_config)
    return model


def _check(layers: Sequence[int], total: int) -> None:
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
