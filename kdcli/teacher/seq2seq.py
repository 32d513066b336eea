"""A frozen transformers encoder-decoder: T5, BART and their kin, which write the response to a prompt."""

from __future__ import annotations

from typing import Any

from kdcli.api import ModelShape, Need, Task
from kdcli.ops.head import Head
from kdcli.store.layers import Layers
from kdcli.store.models import real_ids
from kdcli.store.placed import Reading, write
from kdcli.store.seq2seq import decoder_shape, head_of
from kdcli.teacher._task import TaskTeacher


class Seq2SeqTeacher(TaskTeacher):
    """Its encoder reads the prompt (or the row's `teacher_prompt`), its decoder the response that the student learns;
    one tokenizer with the student. HIDDEN shows the decoder's layers. Settings: HFTeacher."""

    auto = "AutoModelForSeq2SeqLM"
    provides = Need.DISTRIBUTION | Need.LOGITS | Need.LOGPROBS | Need.HIDDEN

    def load_task(self) -> Task:
        return Task(kind="seq2seq")

    def head_of(self, model: Any) -> Head:
        return head_of(model, real_ids(self.tokenizer))

    def shape_of(self, config: Any) -> ModelShape:
        return decoder_shape(config, real_ids(self.load_tokenizer()))

    def read(self, reading: Reading, needs: Need) -> Layers:
        return write(self.model, reading, needs)
