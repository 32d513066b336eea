"""A frozen transformers causal language model that hands out hidden states and its head, never dense logits."""

from __future__ import annotations

from typing import Any, Literal

import torch

from kdcli.api import Batch, ModelShape, Need, Teacher, TeacherSignal
from kdcli.ops.head import Head
from kdcli.store.layers import provides, run, shape_of
from kdcli.store.models import load_config, load_model, load_tokenizer, real_ids
from kdcli.teacher._signal import refuse_places, signal_of


class HFTeacher(Teacher):
    """A folder, a hub id, `recipes://…` or a GGUF file (`package://DISTRIBUTION/FILE.gguf`), loaded in `dtype`.

    The signal holds the hidden states [B, T, D] that predict each target, and the head cut to the tokenizer's
    real ids. Its arithmetic is `dtype`'s, whatever the student is trained in. `attention=eager` lets it show its
    attention probabilities.
    """

    def __init__(
        self,
        *,
        path: str,
        dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16",
        attention: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self.path = path
        self.dtype = dtype
        self.attention = attention
        self.revision = revision
        self.trust_remote_code = trust_remote_code
        self.provides = Need.DISTRIBUTION | Need.LOGITS | Need.LOGPROBS | provides(attention)
        self.model: Any = None  # transformers.PreTrainedModel, from `load` on
        self.head: Head | None = None

    def load_tokenizer(self) -> Any:
        if self.tokenizer is None:
            self.tokenizer = load_tokenizer(self.path, revision=self.revision, trust_remote_code=self.trust_remote_code)
        return self.tokenizer

    def load(self, device: torch.device) -> None:
        self.load_tokenizer()
        self.model = load_model(
            self.path,
            dtype=self.dtype,
            device=device,
            attention=self.attention,
            revision=self.revision,
            trust_remote_code=self.trust_remote_code,
        ).requires_grad_(False)
        self.head = Head.of(self.model, real_ids(self.tokenizer))

    def shape(self) -> ModelShape:
        """Of the loaded model, or else of its config, which needs no weights."""
        if self.model is not None and self.head is not None:
            return shape_of(self.model.config, self.head.vocab_size)
        config = load_config(self.path, revision=self.revision, trust_remote_code=self.trust_remote_code)
        return shape_of(config, real_ids(self.load_tokenizer()))

    @torch.no_grad()
    def annotate(self, batch: Batch, needs: Need) -> TeacherSignal:
        """One pass through the model. Raises ConfigError for attention or relations where the teacher has its own view
        of the batch."""
        if not needs:
            return TeacherSignal()
        assert self.head is not None, "load() comes before annotate()"
        refuse_places(batch, needs)
        inputs = (batch if batch.teacher is None else batch.teacher).model_inputs()
        with torch.autocast(batch.input_ids.device.type, enabled=False):
            layers = run(self.model, inputs, needs)
            return signal_of(layers, self.head, self.model.get_input_embeddings().weight, batch, needs)
