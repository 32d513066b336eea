"""The interface of frozen teachers that label, rewrite or encode a prompt."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import Any, Literal

import torch
import xxhash

from kdcli.api import Batch, ModelShape, Need, Teacher, TeacherSignal
from kdcli.ops.head import Head
from kdcli.store.layers import Layers
from kdcli.store.models import load_config, load_model, load_tokenizer
from kdcli.store.placed import Reading
from kdcli.store.weights import weights_hash
from kdcli.teacher._signal import refuse_places, signal_of


class TaskTeacher(Teacher):
    """`path`, `dtype`, `attention`, `revision`: as in HFTeacher. A subclass says which head there is and what a pass
    through the model shows."""

    auto: str
    new_head = False  # whether weights behind the backbone may be left over, because nothing reads them

    def __init__(
        self,
        *,
        path: str,
        dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16",
        attention: str | None = None,
        revision: str | None = None,
    ) -> None:
        self.path = path
        self.dtype = dtype
        self.attention = attention
        self.revision = revision
        self.model: Any = None  # transformers.PreTrainedModel, from `load` on
        self.head: Head | None = None

    @abstractmethod
    def head_of(self, model: Any) -> Head:
        """What makes logits of `read`'s hidden states."""

    @abstractmethod
    def shape_of(self, config: Any) -> ModelShape:
        """The shape that a transformers config describes."""

    @abstractmethod
    def read(self, reading: Reading, needs: Need) -> Layers:
        """One pass; states are at the student's positions."""

    def load_tokenizer(self) -> Any:
        if self.tokenizer is None:
            self.tokenizer = load_tokenizer(self.path, revision=self.revision)
        return self.tokenizer

    def load(self, device: torch.device) -> None:
        self.load_tokenizer()
        self.model = load_model(
            self.path,
            dtype=self.dtype,
            device=device,
            attention=self.attention,
            revision=self.revision,
            auto=self.auto,
            new_head=self.new_head,
        ).requires_grad_(False)
        self.head = self.head_of(self.model)

    def fingerprint(self) -> str:
        told = [type(self).__name__, weights_hash(self.path, self.revision), self.dtype]
        return xxhash.xxh3_128_hexdigest(repr(told).encode())

    def architecture(self) -> Any:
        return load_config(self.path, revision=self.revision) if self.model is None else self.model.config

    def shape(self) -> ModelShape:
        """Of the loaded model, or else of its config, which needs no weights."""
        return self.shape_of(self.architecture())

    @torch.no_grad()
    def annotate(self, batch: Batch, needs: Need) -> TeacherSignal:
        """One pass through the model."""
        if not needs:
            return TeacherSignal()
        assert self.head is not None, "load() comes before annotate()"
        refuse_places(batch, needs)
        reading = Reading.by_teacher(batch)
        with torch.autocast(batch.input_ids.device.type, enabled=False):
            layers = self.read(reading, needs)
            own = replace(batch, teacher=None, mask=reading.position >= 0)  # the states are at its positions already
            return signal_of(layers, self.head, self.model.get_input_embeddings().weight, own, needs)
