"""The student is the teacher with fewer heads, FFN and hidden units: Minitron, arXiv:2407.14679."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any, ClassVar

from kdcli.api import Data, ModelShape, Student, StudentInit, Teacher
from kdcli.errors import ConfigError
from kdcli.store.models import real_ids
from kdcli.student_init._calibrate import Calibration, compared
from kdcli.student_init._models import source_config, source_of, source_shape, tokenizer_of
from kdcli.student_init._narrow import Aggregate, Scaling, activity, chosen, narrowed
from kdcli.student_init._ranking import Importance, check_keep, kept_layers
from kdcli.student_init._surgery import cut
from kdcli.student_init._units import WIDTHS, Widths, check_known

log = logging.getLogger(__name__)


class PruneWidth(StudentInit):
    """Keep the units that are most active on calibration data, in the teacher or in the student's own model where
    `student.path` names one: `hidden` units (the same in all layers), and in each layer `ffn` units, query `heads` and
    `kv_heads` (groups, whole: every group keeps equally many heads). What is not named stays as it is; `heads` alone
    thins the groups out, `kv_heads` alone drops groups. `layers` first drops layers, as `drop_layers` does.

    Activity is the mean of |activation| over all tokens, or with `aggregate: l2` the root mean square. Each norm's
    weight makes up for the units that it no longer divides by (see `narrowed`): with units that are always 0 gone, the
    student computes what the teacher does. Departs from Minitron, which does not correct the norms. The shapes of
    Sheared-LLaMA (arXiv:2310.06694) are reached without its learned masks.

    Raises ConfigError for sizes that the model does not have or that do not divide, for models that are not Llama-like,
    and as `drop_layers` does.
    """

    option: ClassVar[str] = "prune_width"
    scaling: ClassVar[Scaling] = "norms"

    def __init__(
        self,
        *,
        data: Data,
        hidden: int | None = None,
        ffn: int | None = None,
        heads: int | None = None,
        kv_heads: int | None = None,
        layers: int | None = None,
        layer_importance: Importance = "block_influence",
        aggregate: Aggregate = "mean",
        rows: int = 16,
        heldout: int = 32,
        max_length: int = 256,
    ) -> None:
        self.asked = {"hidden": hidden, "ffn": ffn, "heads": heads, "kv_heads": kv_heads}
        if layers is None and all(value is None for value in self.asked.values()):
            raise ConfigError(
                f"student_init={self.option} is told nothing to cut; give {', '.join(WIDTHS)} or layers: the sizes "
                "that the student should have"
            )
        self.layers = layers
        self.layer_importance: Importance = layer_importance
        self.aggregate: Aggregate = aggregate
        self.calibration = Calibration(data=data, rows=rows, heldout=heldout, max_length=max_length)

    def shape(self, student: Student, teacher: Teacher) -> ModelShape | None:
        if student.model is not None:
            return student.shape()
        config, whole = source_config(student, teacher, self.option), source_shape(student, teacher, self.option)
        widths = self._widths(config)
        check_known(config)
        self.calibration.check(tokenizer_of(student, teacher))
        return replace(
            whole,
            layers=self.layers or whole.layers,
            width=widths.hidden,
            heads=widths.heads,
            kv_heads=widths.kv_heads,
        )

    def __call__(self, student: Student, teacher: Teacher) -> None:
        source, tokenizer = source_of(student, teacher, self.option), tokenizer_of(student, teacher)
        widths = self._widths(source.config)
        rows = self.calibration.to_rank_by(tokenizer, source.device)
        whole = source
        if self.layers is not None:
            kept = kept_layers(source, real_ids(tokenizer), rows, self.layers, importance=self.layer_importance)
            log.info("student_init: keeps layers %s, by %s", kept, self.layer_importance)
            whole = cut(source, kept, dtype=student.dtype).to(source.device)
        units = chosen(activity(whole, rows, self.aggregate), Widths.of(whole.config), widths)
        options = {"dtype": student.dtype, "attention": student.attention}
        model = narrowed(whole, units, widths, rows, scaling=self.scaling, **options).to(source.device)
        held_out = self.calibration.held_out(tokenizer, source.device)
        log.info("student: %s", compared(source, model, tokenizer, held_out))
        student.adopt(model, tokenizer)

    def _widths(self, config: Any) -> Widths:
        """Raises ConfigError for sizes that the model does not have."""
        if self.layers is not None:
            check_keep(self.layers, config.get_text_config().num_hidden_layers, "layers")
        return Widths.of(config).narrowed(**self.asked)
