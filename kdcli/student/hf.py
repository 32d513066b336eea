"""A transformers causal language model that learns: its backbone, its head and its tokenizer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor

from kdcli.api import Batch, ModelShape, Need, Student, StudentOutput
from kdcli.errors import ConfigError
from kdcli.store import paths
from kdcli.store.layers import provides, run, shape_of
from kdcli.store.models import load_config, load_model, load_tokenizer, real_ids
from kdcli.student import _freeze, _tokens


class HFSettings(TypedDict, total=False):
    """Settings of every student that is a transformers language model."""

    path: str | None
    tokenizer: str | None
    chat_template: str | None
    new_tokens: Sequence[str] | Mapping[str, str | None] | None
    train: Sequence[str]
    freeze: Sequence[str]
    dtype: Literal["float32", "bfloat16", "float16"]
    attention: str | None
    revision: str | None
    trust_remote_code: bool


class HFStudent(Student):
    """`path` names the model that learns; without one, student_init makes it (`keep_layers`, `from_config`).

    `tokenizer` names another model's tokenizer; by default it is the student's own, or else the teacher's.
    `chat_template` is a Jinja template, or a file that holds one, in place of the tokenizer's.
    `new_tokens` are put behind the tokenizer's own; a mapping gives each a description, whose tokens' mean row it
    begins as (else the mean of all rows). `train` and `freeze` are patterns over names of parameters: only what `train`
    names learns, and nothing that `freeze` names (kdcli.student._freeze).
    `dtype` is that of the parameters as they are loaded; how they are trained is the engine's `precision`.
    `attention=eager` lets it show its attention probabilities.
    """

    def __init__(
        self,
        *,
        path: str | None = None,
        tokenizer: str | None = None,
        chat_template: str | None = None,
        new_tokens: Sequence[str] | Mapping[str, str | None] | None = None,
        train: Sequence[str] = (),
        freeze: Sequence[str] = (),
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        attention: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        self.path = path
        self.tokenizer_path = tokenizer
        self.chat_template = chat_template
        self.new_tokens = _tokens.described(new_tokens)
        self.train_patterns = list(train)
        self.freeze_patterns = list(freeze)
        self.dtype = dtype
        self.attention = attention
        self.revision = revision
        self.trust_remote_code = trust_remote_code
        self.provides = provides(attention)
        self.model: Any = None  # until `load` or student_init
        self.made = False  # whether a StudentInit has made the model, so that it is no longer that of `path`
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

    def prepared(self, tokenizer: Any) -> Any:
        if tokenizer is not None and tokenizer is not self.tokenizer:
            tokenizer = self._with_template(tokenizer)
        return _tokens.extended(tokenizer, self.new_tokens)

    def check(self, architecture: Callable[[], Any], tokenizer: Callable[[], Any]) -> None:
        if self.new_tokens:
            self.prepared(tokenizer())
        if self.adapts() and (config := architecture()) is not None:
            self.choose(self.sketched(skeleton(config, self.auto, self.trust_remote_code)))

    def adapts(self) -> bool:
        """Whether what `settle` does depends on the model's modules."""
        return bool(self.train_patterns or self.freeze_patterns)

    def sketched(self, model: Any) -> Any:
        """A model without numbers, as `settle` would leave its modules."""
        return model

    def load(self, device: torch.device) -> None:
        self.device = device
        self.load_tokenizer()
        if self.path is not None:
            self.adopt(self.loaded(self.path), self.tokenizer)
            self.made = False

    def loaded(self, path: str) -> Any:
        """The model of `path`."""
        return load_model(
            path,
            dtype=self.dtype,
            device=self.device,
            attention=self.attention,
            revision=self.revision,
            trust_remote_code=self.trust_remote_code,
        )

    def settle(self) -> None:
        assert self.model is not None, "a StudentInit has made the model"
        tokenizer = self.prepared(self.tokenizer)
        _tokens.embed(self.model, tokenizer, self.new_tokens)
        self.tokenizer = tokenizer
        self.inject(self.model)
        super().adopt(self.model, tokenizer)
        self.choose(self.model)

    def inject(self, model: Any) -> None:
        """Put an adapter into the model, where there is one."""
        del model

    def choose(self, model: Any) -> None:
        """Let what learns learn. Raises ConfigError for patterns that do not fit."""
        _freeze.choose(model, self.train_patterns, self.freeze_patterns)

    def adopt(self, model: Any, tokenizer: Any) -> None:
        self.made = True
        if tokenizer is not self.tokenizer:
            self._take_tokenizer(tokenizer)
        super().adopt(self.learning(model), self.tokenizer)

    def learning(self, model: Any) -> Any:
        """The model on this device, all of it learning until `settle`."""
        return model.to(self.device).requires_grad_(True)

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

    def architecture(self) -> Any:
        """The config of the model, or else of `path`."""
        if self.model is not None or self.path is None:
            return None if self.model is None else self.model.config
        return load_config(self.path, revision=self.revision, trust_remote_code=self.trust_remote_code)

    def _take_tokenizer(self, tokenizer: Any) -> None:
        self.tokenizer = self._with_template(tokenizer)

    def _with_template(self, tokenizer: Any) -> Any:
        """A tokenizer with our chat template (on a copy: it may be the teacher's too)."""
        if self.chat_template is None:
            return tokenizer
        own = copy.deepcopy(tokenizer)
        own.chat_template = _template(self.chat_template)
        return own


def skeleton(config: Any, auto: str, trust_remote_code: bool = False) -> Any:
    """A model of this config without its numbers: its modules and the names of its parameters."""
    import transformers

    with torch.device("meta"):
        return getattr(transformers, auto).from_config(config, trust_remote_code=trust_remote_code)


def _template(text: str) -> str:
    """A template as it stands if it has Jinja's braces, else the content of the file it names."""
    if "{{" in text or "{%" in text:
        return text
    try:
        return paths.resolve(text).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"student.chat_template: {text} is neither a Jinja template nor a file ({error})") from error
