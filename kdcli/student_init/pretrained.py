"""The student starts as the pretrained model that `student.path` names."""

from __future__ import annotations

import logging

from kdcli.api import Student, StudentInit, Teacher
from kdcli.errors import ConfigError
from kdcli.student_init._models import size

log = logging.getLogger(__name__)


class Pretrained(StudentInit):
    """Changes nothing. Raises ConfigError if the student has no `path`."""

    def __call__(self, student: Student, teacher: Teacher) -> None:
        del teacher
        if student.model is None:
            raise ConfigError(
                "student_init=pretrained needs student.path, the model to start from; or choose"
                " student_init=keep_layers (cut from the teacher) or student_init=from_config (random weights)"
            )
        log.info("student: pretrained, %s", size(student.model))
