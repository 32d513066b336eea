"""The student is the teacher with some of its layers left out."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from kdcli.api import ModelShape, Student, StudentInit, Teacher
from kdcli.student_init._models import size, source_of, source_shape, tokenizer_of
from kdcli.student_init._surgery import check_layers, cut

log = logging.getLogger(__name__)


class KeepLayers(StudentInit):
    """Copy the named layers (counted from 0), the embeddings, the last norm and the head of the teacher, or of
    the student's own model where `student.path` names one.

    Which layers matter differs from model to model: leaving out every n-th ruins most; `drop_layers` measures it.
    Raises ConfigError if a layer is named twice or does not exist, or if there is no model to cut.
    """

    def __init__(self, *, layers: Sequence[int]) -> None:
        self.layers = list(layers)

    def shape(self, student: Student, teacher: Teacher) -> ModelShape | None:
        """What is cut, with fewer layers. Raises ConfigError as the cut itself does."""
        if student.model is not None:
            return student.shape()
        whole = source_shape(student, teacher, "keep_layers")
        check_layers(self.layers, whole.layers)
        return replace(whole, layers=len(self.layers))

    def __call__(self, student: Student, teacher: Teacher) -> None:
        source = source_of(student, teacher, "keep_layers")
        model = cut(source, self.layers, dtype=student.dtype, attention=student.attention)
        log.info("student: %s, cut from %s", size(model), size(source))
        student.adopt(model, tokenizer_of(student, teacher))
