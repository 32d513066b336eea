"""What the ways to begin a student share: whose weights and tokenizer it begins with, and how big it is."""

from __future__ import annotations

from typing import Any

from torch.distributed.tensor import DTensor

from kdcli.api import ModelShape, Student, Teacher
from kdcli.errors import ConfigError
from kdcli.store.layers import shape_of
from kdcli.store.models import real_ids


def tokenizer_of(student: Student, teacher: Teacher) -> Any:
    """The student's tokenizer, or else the teacher's. Raises ConfigError if neither has one."""
    tokenizer = student.tokenizer
    for model in (student, teacher):
        tokenizer = model.load_tokenizer() if tokenizer is None else tokenizer
    if tokenizer is None:
        raise ConfigError("the student has no tokenizer: set student.tokenizer, or a teacher whose tokenizer it shares")
    return tokenizer


def source_of(student: Student, teacher: Teacher, option: str) -> Any:
    """The model that `student_init=option` cuts: the student's own, or else the teacher's.

    Raises ConfigError if there is none, or if its weights are not whole numbers in this process's memory.
    """
    model = student.model if student.model is not None else getattr(teacher, "model", None)
    if model is None:
        raise _nothing(option, teacher)
    for parameter in model.parameters():
        state = _not_whole(parameter)
        if state:
            raise ConfigError(
                f"student_init={option} cuts a model whose weights are whole in memory, but {type(teacher).__name__}'s "
                f"are {state}; name the same model as student.path, or cut it once with teacher=hf and use that student"
            )
    return model


def source_config(student: Student, teacher: Teacher, option: str) -> Any:
    """The transformers config of what `source_of` will give, without loading weights. Raises ConfigError as it does."""
    config = student.architecture()
    if config is None and hasattr(teacher, "model") and getattr(teacher, "quantization", None) is None:
        config = teacher.architecture()
    if config is None:
        raise _nothing(option, teacher)
    return config


def source_shape(student: Student, teacher: Teacher, option: str) -> ModelShape:
    """The shape of what is cut, with the ids of the student's tokenizer. Raises ConfigError as `source_config` does."""
    return shape_of(source_config(student, teacher, option), real_ids(tokenizer_of(student, teacher)))


def parameters(model: Any) -> int:
    """How many numbers a model learns; tied weights count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def size(model: Any) -> str:
    """`30 layers, 134.5M parameters`; tied weights count once."""
    count = parameters(model)
    unit, name = (1e9, "B") if count >= 1e9 else (1e6, "M")
    return f"{model.config.get_text_config().num_hidden_layers} layers, {count / unit:.2f}{name} parameters"


def _nothing(option: str, teacher: Teacher) -> ConfigError:
    held = "no teacher" if teacher.architecture() is None else f"a {type(teacher).__name__}, which is not whole here"
    return ConfigError(
        f"student_init={option} needs a model to cut, whole in memory and not quantized: set teacher=hf, or "
        f"student.path (now there is {held}, and student.path names none)"
    )


def _not_whole(parameter: Any) -> str:
    """What a parameter is instead of whole; empty if it is."""
    if hasattr(parameter, "ds_id") or isinstance(parameter, DTensor):
        return "split over the ranks"
    if parameter.is_meta:
        return "not in memory"
    return "" if parameter.is_floating_point() else "quantized"
