"""The student is a new model with random weights, of a given architecture and the tokenizer's vocabulary."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from kdcli.api import ModelShape, Student, StudentInit, Teacher
from kdcli.errors import ConfigError
from kdcli.store.layers import shape_of
from kdcli.store.models import load_config, real_ids
from kdcli.student_init._models import size, tokenizer_of

log = logging.getLogger(__name__)


class FromConfig(StudentInit):
    """`config` is a transformers config as a mapping (`model_type: llama`, `hidden_size: 128`, …), or the path of a
    model to take it from; `overrides` change single settings of it. The vocabulary's size and the special ids are
    the tokenizer's. The same seed gives the same weights, whatever was drawn before.

    Raises ConfigError for an unknown architecture or setting, and for a vocabulary smaller than the tokenizer's.
    """

    def __init__(
        self, *, config: Mapping[str, Any] | str, overrides: Mapping[str, Any] | None = None, seed: int = 0
    ) -> None:
        self.config = config
        self.overrides = dict(overrides or {})
        self.seed = seed

    def shape(self, student: Student, teacher: Teacher) -> ModelShape:
        tokenizer = tokenizer_of(student, teacher)
        with _explained():
            return shape_of(_config(self.config, self.overrides, tokenizer), real_ids(tokenizer))

    def architecture(self, student: Student, teacher: Teacher) -> Any:
        with _explained():
            return _config(self.config, self.overrides, tokenizer_of(student, teacher))

    def __call__(self, student: Student, teacher: Teacher) -> None:
        import transformers

        tokenizer = tokenizer_of(student, teacher)
        with torch.random.fork_rng(), _explained():
            torch.manual_seed(self.seed)
            model = getattr(transformers, student.auto).from_config(
                student.configured(_config(self.config, self.overrides, tokenizer)),
                dtype=getattr(torch, student.dtype),
                attn_implementation=student.attention,
            )
        log.info("student: random weights, seed %d, %s", self.seed, size(model))
        student.adopt(model, tokenizer)


@contextmanager
def _explained() -> Iterator[None]:
    """Turn what transformers raises for an impossible architecture into a ConfigError."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        yield
    except (StrictDataclassError, ValueError, TypeError, ZeroDivisionError, ImportError) as error:
        raise ConfigError(f"student_init.config: {' '.join(str(error).split())}") from error


def _config(source: Mapping[str, Any] | str, overrides: Mapping[str, Any], tokenizer: Any) -> Any:
    """The transformers config, with the tokenizer's vocabulary and special ids."""
    from transformers import AutoConfig

    base = load_config(source).to_dict() if isinstance(source, str) else dict(source)
    kind = base.pop("model_type", None)
    _check("overrides", overrides, kind)
    if isinstance(source, str):
        asked = dict(overrides)
        if "num_hidden_layers" in overrides:
            base.pop("layer_types", None)  # one entry per layer; follows from the other settings
    else:
        _check("config", base, kind)
        asked = base | dict(overrides)
    real = real_ids(tokenizer)
    rows = asked.get("vocab_size", real)
    if rows < real:
        raise ConfigError(f"student_init: vocab_size is {rows}, but the tokenizer has {real} ids; leave it out")
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return AutoConfig.for_model(kind, **(base | dict(overrides) | ids | {"vocab_size": rows}))


def _check(name: str, settings: Mapping[str, Any], kind: str | None) -> None:
    """Raise ConfigError where a config of architecture `kind` has no such setting, or there is no such one."""
    from transformers import CONFIG_MAPPING

    if kind is None or kind not in CONFIG_MAPPING:
        close = difflib.get_close_matches(kind or "", list(CONFIG_MAPPING), n=1)
        hint = f"did you mean {close[0]}?" if close else "for example llama, qwen3, gpt2"
        raise ConfigError(f"student_init.config.model_type: {kind!r} is no architecture of transformers; {hint}")
    default = CONFIG_MAPPING[kind]()
    known = set(default.to_dict()) | set(default.attribute_map)
    for key in settings:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]}?" if close else "see transformers' page of that model"
            raise ConfigError(f"student_init.{name}.{key}: {kind} models have no such setting; {hint}")
