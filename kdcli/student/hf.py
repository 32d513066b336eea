"""A transformers causal language model that learns: its backbone, its head and its tokenizer."""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import Tensor

from kdcli.api import Batch, ModelShape, Need, Student, StudentOutput
from kdcli.errors import ConfigError
from kdcli.store import paths
from kdcli.store.layers import provides, run, shape_of
from kdcli.store.models import load_config, load_model, load_tokenizer, real_ids


class HFStudent(Student):
    """`path` names the model that learns; without one, student_init makes it (`keep_layers`, `from_config`).

    `tokenizer` names another model's tokenizer; by default it is the student's own, or else the teacher's.
    `chat_template` is a Jinja template, or a file that holds one, in place of the tokenizer's.
    `dtype` is that of the parameters as they are loaded; how they are trained is the engine's `precision`.
    `attention=eager` lets it show its attention probabilities.
    """

    def __init__(
        self,
        *,
        path: str | None = None,
        tokenizer: str | None = None,
        chat_template: str | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        attention: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        self.path = path
        self.tokenizer_path = tokenizer
        self.chat_template = chat_template
        self.dtype = dtype
        self.attention = attention
        self.revision = revision
        self.trust_remote_code = trust_remote_code
        self.provides = provides(attention)
        self.model: Any = None  # until `load` or student_init
        self.tokenizer: Any = None
        self.device = torch.device("cpu")

    def load_tokenizer(self) -> Any:
        """The tokenizer, or None where it will be the teacher's."""
        if self.tokenizer is None and self.tokenizer_path is not None:
            self._take_tokenizer(load_tokenizer(self.tokenizer_path))
        elif self.tokenizer is None and self.path is not None:
            self._take_tokenizer(
                load_tokenizer(self.path, revision=self.revision, trust_remote_code=self.trust_remote_code)
            )
        return self.tokenizer

    def load(self, device: torch.device) -> None:
        self.device = device
        self.load_tokenizer()
        if self.path is not None:
            model = load_model(
                self.path,
                dtype=self.dtype,
                device=device,
                attention=self.attention,
                revision=self.revision,
                trust_remote_code=self.trust_remote_code,
            )
            self.adopt(model, self.tokenizer)

    def adopt(self, model: Any, tokenizer: Any) -> None:
        if tokenizer is not self.tokenizer:
            self._take_tokenizer(tokenizer)
        super().adopt(model.to(self.device).requires_grad_(True), self.tokenizer)

    def forward(self, batch: Batch) -> Tensor:
        return self.model.base_model(**batch.model_inputs()).last_hidden_state

    def states(self, batch: Batch, needs: Need) -> StudentOutput:
        """Raises ConfigError for layers that this model cannot show."""
        layers = run(self.model, batch.model_inputs(), needs)
        return StudentOutput(
            hidden=layers.hidden,
            head=self.head,
            hidden_states=layers.hidden_states,
            attentions=layers.attentions,
            relations=layers.relations,
            embedding=self.model.get_input_embeddings().weight if Need.HIDDEN in needs else None,
        )

    def shape(self) -> ModelShape | None:
        """Of the model, or else of the config of `path`; None while there is neither."""
        if self.model is not None:
            return shape_of(self.model.config, self.head.vocab_size)
        if self.path is None:
            return None
        config = load_config(self.path, revision=self.revision, trust_remote_code=self.trust_remote_code)
        return shape_of(config, real_ids(self.load_tokenizer()))

    def _take_tokenizer(self, tokenizer: Any) -> None:
        """Hold a tokenizer, with our chat template (on a copy: it may be the teacher's too)."""
        self.tokenizer = tokenizer
        if self.chat_template is not None:
            self.tokenizer = copy.deepcopy(tokenizer)
            self.tokenizer.chat_template = _template(self.chat_template)


def _template(text: str) -> str:
    """A template as it stands if it has Jinja's braces, else the content of the file it names."""
    if "{{" in text or "{%" in text:
        return text
    try:
        return paths.resolve(text).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"student.chat_template: {text} is neither a Jinja template nor a file ({error})") from error
