"""A frozen transformers classifier: what it says of a prompt's labels, whatever its tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from kdcli.api import ModelShape, Need, Task
from kdcli.ops.head import Head
from kdcli.store.layers import Layers, shape_of
from kdcli.store.models import load_config
from kdcli.store.placed import Reading, classify
from kdcli.store.read import last_linear
from kdcli.store.tasks import labels_in, named_labels
from kdcli.teacher._task import TaskTeacher


class ClassifierTeacher(TaskTeacher):
    """A model with a head of labels, loaded in `dtype`; teachers of other tokenizers read the prompt in their own.

    `labels` names its classes in their order; by default they are those of the model's config. HIDDEN shows each
    layer's state of the first token. Other settings: HFTeacher.
    """

    auto = "AutoModelForSequenceClassification"
    provides = Need.DISTRIBUTION | Need.LOGITS | Need.LOGPROBS | Need.HIDDEN

    def __init__(
        self,
        *,
        path: str,
        labels: Sequence[str] | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16",
        attention: str | None = None,
        revision: str | None = None,
    ) -> None:
        super().__init__(path=path, dtype=dtype, attention=attention, revision=revision)
        self.labels = named_labels(labels, "teacher")

    def load_task(self) -> Task:
        labels = self.labels or labels_in(load_config(self.path, revision=self.revision))
        return Task(kind="classification", labels=labels)

    def head_of(self, model: Any) -> Head:
        linear = last_linear(model, model.config.num_labels)
        return Head(weight=linear.weight, bias=linear.bias, vocab_size=model.config.num_labels)

    def shape_of(self, config: Any) -> ModelShape:
        return shape_of(config, config.num_labels)

    def read(self, reading: Reading, needs: Need) -> Layers:
        head = last_linear(self.model, self.model.config.num_labels)
        return classify(self.model, head, reading, needs, self.tokenizer.sep_token_id)
