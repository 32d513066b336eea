"""The interface of students that label, rewrite or encode a prompt: loaded by another class of transformers."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Literal

import torch
from torch import Tensor

from kdcli.api import Batch, ModelShape, Need, Student, StudentOutput
from kdcli.ops.head import Head
from kdcli.store.layers import Layers
from kdcli.store.models import load_config, load_model, load_tokenizer
from kdcli.store.placed import Reading


class TaskStudent(Student):
    """`path`, `tokenizer`, `dtype`, `attention`, `revision`: as in HFStudent. A subclass says which head there is and
    what a pass through the model shows."""

    new_head = False  # whether `path` may name a model with another head: what is left over is not read

    def __init__(
        self,
        *,
        path: str | None = None,
        tokenizer: str | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        attention: str | None = None,
        revision: str | None = None,
    ) -> None:
        super().__init__()
        self.path = path
        self.tokenizer_path = tokenizer
        self.dtype = dtype
        self.attention = attention
        self.revision = revision
        self.model: Any = None  # until `load` or student_init
        self.tokenizer: Any = None
        self.device = torch.device("cpu")

    @abstractmethod
    def head_of(self, model: Any) -> Head:
        """What makes logits of `forward`'s states."""

    @abstractmethod
    def shape_of(self, config: Any) -> ModelShape:
        """The shape that a transformers config describes."""

    @abstractmethod
    def read(self, reading: Reading, needs: Need) -> Layers:
        """One pass; states are at the student's positions."""

    def loaded(self, path: str, **settings: Any) -> Any:
        """The model of `path`; `settings` are of its config."""
        return load_model(
            path,
            dtype=self.dtype,
            device=self.device,
            attention=self.attention,
            revision=self.revision,
            auto=self.auto,
            settings=settings,
            new_head=self.new_head,
        )

    def load_tokenizer(self) -> Any:
        """The tokenizer, or None where it will be the teacher's."""
        if self.tokenizer is None and self.tokenizer_path is not None:
            self.tokenizer = load_tokenizer(self.tokenizer_path)
        elif self.tokenizer is None and self.path is not None:
            self.tokenizer = load_tokenizer(self.path, revision=self.revision)
        return self.tokenizer

    def load(self, device: torch.device) -> None:
        self.device = device
        self.load_tokenizer()
        if self.path is not None:
            self.adopt(self.loaded(self.path), self.tokenizer)

    def adopt(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model.to(self.device).requires_grad_(True), tokenizer
        self.head = self.head_of(self.model)

    def forward(self, batch: Batch) -> Tensor:
        return self.read(Reading.by_student(batch), Need.NOTHING).hidden

    def states(self, batch: Batch, needs: Need) -> StudentOutput:
        layers = self.read(Reading.by_student(batch), needs)
        return StudentOutput(
            hidden=layers.hidden,
            head=self.head,
            hidden_states=layers.hidden_states,
            attentions=layers.attentions,
            relations=layers.relations,
            embedding=self.model.get_input_embeddings().weight if Need.HIDDEN in needs else None,
            bidirectional=self.task.kind == "encoding",
        )

    def shape(self) -> ModelShape | None:
        if self.model is not None:
            return self.shape_of(self.model.config)
        return None if self.path is None else self.shape_of(load_config(self.path, revision=self.revision))

    def architecture(self) -> Any:
        if self.model is not None:
            return self.model.config
        return None if self.path is None else load_config(self.path, revision=self.revision)
