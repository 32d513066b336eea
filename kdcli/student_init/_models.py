"""What the ways to begin a student share: whose tokenizer it has, and how big it is."""

from __future__ import annotations

from typing import Any

from kdcli.api import Student, Teacher
from kdcli.errors import ConfigError


def tokenizer_of(student: Student, teacher: Teacher) -> Any:
    """The student's tokenizer, or else the teacher's. Raises ConfigError if neither has one."""
    tokenizer = student.tokenizer
    for model in (student, teacher):
        tokenizer = model.load_tokenizer() if tokenizer is None else tokenizer
    if tokenizer is None:
        raise ConfigError("the student has no tokenizer: set student.tokenizer, or a teacher whose tokenizer it shares")
    return tokenizer


def size(model: Any) -> str:
    """`30 layers, 134.5M parameters`; tied weights count once."""
    count = sum(parameter.numel() for parameter in model.parameters())
    unit, name = (1e9, "B") if count >= 1e9 else (1e6, "M")
    return f"{model.config.get_text_config().num_hidden_layers} layers, {count / unit:.2f}{name} parameters"
