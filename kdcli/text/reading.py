"""What the tokenization of a run depends on besides the student's tokenizer: its task, and for labels the teacher's."""

from __future__ import annotations

from typing import Any

from kdcli.api import Task
from kdcli.text.vocabulary import share_ids


def reading(task: Task, tokenizer: Any, other: Any) -> dict[str, Any]:
    """Arguments of `encode`. Labels are one vocabulary whatever the tokenizers (`other` is the teacher's, or None), so
    that a classifier of another tokenizer reads the prompt in its own."""
    apart = task.kind == "classification" and other is not None and differ(tokenizer, other)
    return {"task": task, "teacher_tokenizer": other if apart else None}


def differ(tokenizer: Any, other: Any) -> bool:
    """Whether two tokenizers give tokens other ids."""
    return other is not tokenizer and not share_ids(other.get_vocab(), tokenizer.get_vocab())
