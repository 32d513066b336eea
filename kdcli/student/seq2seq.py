"""A transformers encoder-decoder that learns: T5, BART and their kin write the response to a prompt."""

from __future__ import annotations

from typing import Any

from kdcli.api import ModelShape, Need, Task
from kdcli.ops.head import Head
from kdcli.store.layers import Layers
from kdcli.store.models import real_ids
from kdcli.store.placed import Reading, decoder_start, write
from kdcli.store.seq2seq import decoder_shape, head_of
from kdcli.student._task import TaskStudent


class Seq2SeqStudent(TaskStudent):
    """The encoder reads a row's prompt, the decoder writes its response; both count in batch.max_length.

    `hidden` is what the head reads, with all that a family does to it first (T5 divides by the root of the width).
    HIDDEN shows the decoder's layers. Settings: HFStudent.
    """

    auto = "AutoModelForSeq2SeqLM"
    task = Task(kind="seq2seq")
    provides = Need.HIDDEN

    def configured(self, config: Any) -> Any:
        config.decoder_start_token_id = decoder_start(config)  # generation asks for it by that name
        return config

    def head_of(self, model: Any) -> Head:
        return head_of(model, real_ids(self.tokenizer))

    def shape_of(self, config: Any) -> ModelShape:
        tokenizer = self.load_tokenizer()
        return decoder_shape(config, config.vocab_size if tokenizer is None else real_ids(tokenizer))

    def read(self, reading: Reading, needs: Need) -> Layers:
        return write(self.model, reading, needs)
