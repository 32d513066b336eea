"""A sequence classifier of transformers as a critic: the probability of a label, or the logit of a reward model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch

from kdcli.api import Desk, Example
from kdcli.augmentation._lm import device_of, pad, sorted_batches
from kdcli.augmentation._once import once
from kdcli.errors import ConfigError
from kdcli.store.models import load_config, load_model, load_tokenizer
from kdcli.store.weights import model_fingerprint


class Classifier:
    """Scores texts, or pairs of texts, cut to `max_length` tokens; each once per weights, as `desk` remembers them.

    Without `label` the model must have one class, whose logit is the score. Weights load with the first text that is
    not known. Raises ConfigError for a model of other classes.
    """

    def __init__(
        self,
        path: str,
        *,
        revision: str | None,
        label: str | None,
        dtype: str,
        device: str | None,
        batch: int,
        max_length: int,
        where: str,
    ) -> None:
        self.path, self.revision, self.label, self.dtype = path, revision, label, dtype
        self.device = device_of(device)
        self.batch = batch
        self.max_length = max_length
        self.where = where

    def check(self) -> None:
        """Refuse a model that cannot give the number, before its weights load."""
        _ = self._column

    def chat(self, example: Example) -> str | None:
        """Prompt and response, or messages, in the model's chat template; None where either is not there."""
        if not self._tokenizer.chat_template:
            return None
        messages = example.messages
        if messages is None and example.prompt is not None and example.response is not None:
            messages = [{"role": "user", "content": example.prompt}, {"role": "assistant", "content": example.response}]
        if messages is None:
            return None
        return self._tokenizer.apply_chat_template([dict(one) for one in messages], tokenize=False)

    def scores(self, desk: Desk, texts: Sequence[tuple[str, ...]]) -> list[float | None]:
        """A number for each text or pair; None where the model gives no finite one."""
        return once(desk, self._kind, texts, self._computed)

    @torch.no_grad()
    def _computed(self, texts: Sequence[tuple[str, ...]]) -> list[float | None]:
        special = not self._tokenizer.chat_template  # a chat template writes them itself
        ids: list[list[int]] = [
            self._tokenizer(*one, add_special_tokens=special, truncation=True, max_length=self.max_length)["input_ids"]
            for one in texts
        ]
        # A decoder finds a row's end by its padding token; without one it takes one row at a time.
        padding = self._model.config.get_text_config().pad_token_id
        found: list[float | None] = [None] * len(texts)
        for places in sorted_batches([len(one) for one in ids], self.batch if padding is not None else 1):
            inputs, mask = pad([ids[place] for place in places], padding or 0, self.device)
            logits = self._model(input_ids=inputs, attention_mask=mask).logits.float()
            column = logits[:, 0] if self.label is None else logits.softmax(-1)[:, self._column]
            for place, value in zip(places, column.tolist(), strict=True):
                found[place] = value if math.isfinite(value) else None
        return found

    @cached_property
    def _kind(self) -> str:
        weights = model_fingerprint(self.path, self.dtype, self.revision)
        return f"classifier {weights} {self.label} {self.max_length}"

    @cached_property
    def _column(self) -> int:
        config = load_config(self.path, revision=self.revision)
        if self.label is None:
            if config.num_labels != 1:
                raise ConfigError(
                    f"{self.where}.model: {self.path} has {config.num_labels} labels, but a reward model has one; "
                    "choose scorer=classifier with a label"
                )
            return 0
        labels = {str(name): int(number) for number, name in config.id2label.items()}
        if self.label not in labels:
            raise ConfigError(f"{self.where}.label: {self.path} has {', '.join(labels)}, not {self.label}")
        return labels[self.label]

    @cached_property
    def _tokenizer(self) -> Any:
        return load_tokenizer(self.path, revision=self.revision)

    @cached_property
    def _model(self) -> Any:
        return load_model(
            self.path,
            dtype=self.dtype,
            device=self.device,
            revision=self.revision,
            auto="AutoModelForSequenceClassification",
        ).requires_grad_(False)
