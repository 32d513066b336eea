"""The student is the teacher without the layers that calibration data show it can do without."""

from __future__ import annotations

import logging
from dataclasses import replace

from kdcli.api import Data, ModelShape, Student, StudentInit, Teacher
from kdcli.errors import ConfigError
from kdcli.store.models import real_ids
from kdcli.student_init._calibrate import Calibration, compared
from kdcli.student_init._models import source_of, source_shape, tokenizer_of
from kdcli.student_init._ranking import Importance, check_keep, kept_layers
from kdcli.student_init._surgery import cut

log = logging.getLogger(__name__)


class DropLayers(StudentInit):
    """Keep the `keep` layers that matter most to the teacher, or to the student's own model where `student.path` names
    one. What a layer matters is

        leave_one_out:    the loss without it, in nats per target; with `greedy`, layers go one at a time, and what is
                          left is ranked anew after each (L - keep times the cost)
        block_influence:  1 - mean cosine of what enters and what leaves it (ShortGPT, arXiv:2403.03853)
        angular:          not one layer but the block of neighbours goes whose two ends are closest in angle
                          (arXiv:2403.17887)

    measured on `rows` rows of `data`; `heldout` further rows say in the log what the cut has cost. After the call
    `kept` is the list of layers. Every rank ranks the same rows, so every rank keeps the same layers.

    Raises ConfigError if there is no model to cut or it has fewer layers, and for data with too few rows.
    """

    def __init__(
        self,
        *,
        keep: int,
        data: Data,
        importance: Importance = "leave_one_out",
        greedy: bool = False,
        rows: int = 16,
        heldout: int = 32,
        max_length: int = 256,
    ) -> None:
        if greedy and importance != "leave_one_out":
            raise ConfigError(
                f"student_init.greedy ranks by leave_one_out, not by {importance}; set student_init.greedy=false, or "
                "student_init.importance=leave_one_out"
            )
        self.keep = keep
        self.importance: Importance = importance
        self.greedy = greedy
        self.calibration = Calibration(data=data, rows=rows, heldout=heldout, max_length=max_length)
        self.kept: list[int] = []

    def shape(self, student: Student, teacher: Teacher) -> ModelShape | None:
        if student.model is not None:
            return student.shape()
        whole = source_shape(student, teacher, "drop_layers")
        check_keep(self.keep, whole.layers, "keep")
        self.calibration.check(tokenizer_of(student, teacher))
        return replace(whole, layers=self.keep)

    def __call__(self, student: Student, teacher: Teacher) -> None:
        source, tokenizer = source_of(student, teacher, "drop_layers"), tokenizer_of(student, teacher)
        total = source.config.get_text_config().num_hidden_layers
        check_keep(self.keep, total, "keep")
        rows = self.calibration.to_rank_by(tokenizer, source.device)
        self.kept = kept_layers(
            source, real_ids(tokenizer), rows, self.keep, importance=self.importance, greedy=self.greedy
        )
        log.info("student_init: keeps layers %s of %d, by %s", self.kept, total, self.importance)
        model = cut(source, self.kept, dtype=student.dtype, attention=student.attention).to(source.device)
        held_out = self.calibration.held_out(tokenizer, source.device)
        log.info("student: %s", compared(source, model, tokenizer, held_out))
        student.adopt(model, tokenizer)
