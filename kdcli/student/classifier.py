"""A transformers classifier that learns: BERT and its kin with a head of labels, one target per prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch

from kdcli.api import ModelShape, Need, Task
from kdcli.errors import ConfigError
from kdcli.ops.head import Head
from kdcli.store.layers import Layers, shape_of
from kdcli.store.models import load_config
from kdcli.store.placed import Reading, classify
from kdcli.store.read import last_linear
from kdcli.store.tasks import labels_in, named_labels, with_labels
from kdcli.student._task import TaskStudent


class ClassifierStudent(TaskStudent):
    """A row's `response` is the name of its label, and the vocabulary of all losses is the labels.

    `hidden` is what the head's last linear layer reads, at the label's position; HIDDEN shows there each layer's state
    of the first token (PKD, arXiv:1908.09355). `labels` are by default those of the model's config, or else the
    teacher's. Where `path` names a model without a head for them (a language model, other labels), the head begins with
    random weights from `seed`. Other settings: HFStudent. Raises ConfigError where nobody names labels.
    """

    auto = "AutoModelForSequenceClassification"
    new_head = True
    provides = Need.HIDDEN

    def __init__(
        self,
        *,
        path: str | None = None,
        labels: Sequence[str] | None = None,
        tokenizer: str | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        attention: str | None = None,
        revision: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(path=path, tokenizer=tokenizer, dtype=dtype, attention=attention, revision=revision)
        self.labels = named_labels(labels, "student")
        self.seed = seed
        self.task = Task(kind="classification", labels=self.labels)

    def load_task(self) -> Task:
        if not self.task.labels and self.path is not None:
            labels = labels_in(load_config(self.path, revision=self.revision))
            self.task = Task(kind="classification", labels=labels)
        return self.task

    def loaded(self, path: str, **settings: Any) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            return super().loaded(path, **_names(self._labels()), **settings)

    def configured(self, config: Any) -> Any:
        return with_labels(config, self._labels())

    def adopt(self, model: Any, tokenizer: Any) -> None:
        labels = self._labels()
        if model.config.num_labels != len(labels):
            raise ConfigError(
                f"student: its model has {model.config.num_labels} classes, but there are {len(labels)} labels "
                f"({', '.join(labels)}); cut the student from a model of these labels, or set student.path"
            )
        with_labels(model.config, labels)
        super().adopt(model, tokenizer)

    def head_of(self, model: Any) -> Head:
        linear = last_linear(model, model.config.num_labels)
        return Head(weight=linear.weight, bias=linear.bias, vocab_size=model.config.num_labels)

    def shape_of(self, config: Any) -> ModelShape:
        return shape_of(config, len(self.task.labels) or config.num_labels)

    def read(self, reading: Reading, needs: Need) -> Layers:
        head = last_linear(self.model, self.model.config.num_labels)
        return classify(self.model, head, reading, needs, self.tokenizer.sep_token_id)

    def _labels(self) -> tuple[str, ...]:
        labels = self.load_task().labels
        if not labels:
            raise ConfigError("student.labels: which labels are there? add student.labels=[first,second,…]")
        return labels


def _names(labels: Sequence[str]) -> dict[str, Any]:
    """The settings of a config with these classes."""
    return {"id2label": dict(enumerate(labels)), "label2id": {label: index for index, label in enumerate(labels)}}
