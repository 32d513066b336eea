"""A frozen transformers causal language model that hands out hidden states and its head, never dense logits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor

from kdcli.api import Batch, ModelShape, Need, Task, Teacher, TeacherSignal
from kdcli.ops.head import Head
from kdcli.store.layers import Layers, provides, run, shape_of
from kdcli.store.models import load_config, load_model, load_tokenizer, real_ids
from kdcli.store.weights import model_fingerprint
from kdcli.teacher._signal import refuse_places, signal_of

Dtype = Literal["float32", "bfloat16", "float16"]


class Settings(TypedDict, total=False):
    """Settings of every such teacher; constructors hand them on as `**settings: Unpack[Settings]`."""

    path: str
    dtype: Dtype
    attention: str | None
    revision: str | None
    trust_remote_code: bool


class Frozen(Teacher):
    """A folder, a hub id, `recipes://…` or a GGUF file (`package://DISTRIBUTION/FILE.gguf`), in `dtype`; where its
    parameters live is the leaf's.

    The signal holds the hidden states [B, T, D] that predict each target, and the head cut to the tokenizer's
    real ids. Its arithmetic is `dtype`'s, whatever the student is trained in. `attention=eager` lets it show its
    attention probabilities.
    """

    def __init__(
        self,
        *,
        path: str,
        dtype: Dtype = "bfloat16",
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
        self.frozen: Any = (
            None  # transformers.PreTrainedModel, from `load` on; a leaf may keep its parameters elsewhere
        )
        self.head: Head | None = None  # its weight is a plain tensor, whole
        self.tied = False  # the head's weight is the input embedding's

    def load_tokenizer(self) -> Any:
        if self.tokenizer is None:
            self.tokenizer = load_tokenizer(self.path, **self._source)
        return self.tokenizer

    def fingerprint(self) -> str:
        """Of the weights, dtype and quantization: where the parameters live changes no number."""
        quantization = getattr(self, "quantization", None)
        return model_fingerprint(self.path, self.dtype, self.revision, *([quantization] if quantization else []))

    def load_task(self) -> Task:
        return Task()

    def shape(self) -> ModelShape:
        """Of the loaded model, or else of its config, which needs no weights."""
        if self.frozen is not None and self.head is not None:
            return shape_of(self.frozen.config, self.head.vocab_size)
        return shape_of(self.architecture(), real_ids(self.load_tokenizer()))

    def architecture(self) -> Any:
        return load_config(self.path, **self._source) if self.frozen is None else self.frozen.config

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
            layers = self._run(inputs, needs)
            embedding = self._embedding if Need.HIDDEN in needs else None
            return signal_of(layers, self.head, embedding, batch, needs)

    # ------------------------------------------------------------------------------------------------ for the leaves

    @property
    def _source(self) -> dict[str, Any]:
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}

    def _load(self, device: torch.device | str, placed: Mapping[str, Any] | None = None) -> Any:
        """The model; `placed`: see `load_model`."""
        return load_model(
            self.path, dtype=self.dtype, device=device, attention=self.attention, placed=placed, **self._source
        )

    def _take(self, model: Any) -> None:
        """Hold `model`, and its head."""
        self.frozen = model.requires_grad_(False)
        self.tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        head = Head.of(model, real_ids(self.load_tokenizer()))
        bias = None if head.bias is None else self._whole(head.bias)
        self.head = replace(head, weight=self._whole(head.weight), bias=bias)

    def _run(self, inputs: dict[str, Any], needs: Need) -> Layers:
        return run(self.frozen, inputs, needs)

    def _whole(self, parameter: Any) -> Tensor:
        """A parameter of the model as a plain tensor."""
        return parameter

    @cached_property
    def _embedding(self) -> Tensor:
        """[V', D] of the input ids; that of the head where they are one."""
        assert self.head is not None, "load() comes first"
        return self.head.weight if self.tied else self._whole(self.frozen.get_input_embeddings().weight)
