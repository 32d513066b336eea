"""A transformers encoder without a head that learns: each token's state, for losses on layers (MiniLM, TinyBERT)."""

from __future__ import annotations

from typing import Any, Literal

from kdcli.api import ModelShape, Need, Task
from kdcli.ops.head import Head
from kdcli.store.layers import Layers, provides, shape_of
from kdcli.store.models import real_ids
from kdcli.store.placed import Reading, encode
from kdcli.student._task import TaskStudent


class EncoderStudent(TaskStudent):
    """Every token of a row's text (or prompt; a response is not read) is a target, and losses compare the layers there;
    attention and relations see the whole text. There are no logits: objectives on distributions are refused.

    `path` may name a language model or a classifier too: its head is left out. Settings: HFStudent.
    """

    auto = "AutoModel"
    task = Task(kind="encoding")
    new_head = True

    def __init__(
        self,
        *,
        path: str | None = None,
        tokenizer: str | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        attention: str | None = None,
        revision: str | None = None,
    ) -> None:
        super().__init__(path=path, tokenizer=tokenizer, dtype=dtype, attention=attention, revision=revision)
        self.provides = provides(attention)

    def head_of(self, model: Any) -> Head:
        """The embedding, which nobody asks for logits."""
        weight = model.get_input_embeddings().weight
        return Head(weight=weight, vocab_size=min(real_ids(self.tokenizer), len(weight)))

    def shape_of(self, config: Any) -> ModelShape:
        return shape_of(config, config.vocab_size)

    def read(self, reading: Reading, needs: Need) -> Layers:
        return encode(self.model, reading, needs, self.tokenizer.sep_token_id)
