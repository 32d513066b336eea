"""A frozen transformers encoder without a head: its layers' states, attention and relations over a whole text."""

from __future__ import annotations

from typing import Any, Literal

from kdcli.api import ModelShape, Need, Task
from kdcli.ops.head import Head
from kdcli.store.layers import Layers, provides, shape_of
from kdcli.store.models import real_ids
from kdcli.store.placed import Reading, encode
from kdcli.teacher._task import TaskTeacher


class EncoderTeacher(TaskTeacher):
    """Each token of a row's text (or prompt) has a state in every layer; one tokenizer with the student. `path` may
    name a classifier too: its head is left out. Settings: HFTeacher; `attention=eager` shows probabilities."""

    auto = "AutoModel"
    new_head = True

    def __init__(
        self,
        *,
        path: str,
        dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16",
        attention: str | None = None,
        revision: str | None = None,
    ) -> None:
        super().__init__(path=path, dtype=dtype, attention=attention, revision=revision)
        self.provides = provides(attention)

    def load_task(self) -> Task:
        return Task(kind="encoding")

    def head_of(self, model: Any) -> Head:
        """The embedding, which nobody asks for logits."""
        weight = model.get_input_embeddings().weight
        return Head(weight=weight, vocab_size=min(real_ids(self.tokenizer), len(weight)))

    def shape_of(self, config: Any) -> ModelShape:
        return shape_of(config, config.vocab_size)

    def read(self, reading: Reading, needs: Need) -> Layers:
        return encode(self.model, reading, needs, self.tokenizer.sep_token_id)
