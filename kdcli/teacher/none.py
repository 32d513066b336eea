"""No teacher: for objectives that only need text, such as cross_entropy."""

from __future__ import annotations

from kdcli.api import Batch, Need, Teacher, TeacherSignal


class NoTeacher(Teacher):
    """Provides nothing and has no tokenizer."""

    provides = Need.NOTHING

    def annotate(self, batch: Batch, needs: Need) -> TeacherSignal:
        del batch
        assert not needs, f"no teacher provides {needs}"
        return TeacherSignal()
