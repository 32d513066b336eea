"""A frozen transformers causal language model that hands out hidden states and its head, never dense logits."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from kdcli.api import Batch, ModelShape, Need, Teacher, TeacherSignal, TeacherView
from kdcli.errors import ConfigError
from kdcli.ops.chunked import chunk_size, target_logprobs
from kdcli.ops.head import Head
from kdcli.store.layers import provides, run, shape_of
from kdcli.store.models import load_config, load_model, load_tokenizer, real_ids


class HFTeacher(Teacher):
    """A folder, a hub id, `recipes://…` or a GGUF file (`package://DISTRIBUTION/FILE.gguf`), loaded in `dtype`.

    The signal holds the hidden states [B, T, D] that predict each target, and the head cut to the tokenizer's
    real ids. Its arithmetic is `dtype`'s, whatever the student is trained in. `attention=eager` lets it show its
    attention probabilities.
    """

    def __init__(
        self,
        *,
        path: str,
        dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16",
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
        self.model: Any = None  # transformers.PreTrainedModel, from `load` on
        self.head: Head | None = None

    def load_tokenizer(self) -> Any:
        if self.tokenizer is None:
            self.tokenizer = load_tokenizer(self.path, revision=self.revision, trust_remote_code=self.trust_remote_code)
        return self.tokenizer

    def load(self, device: torch.device) -> None:
        self.load_tokenizer()
        self.model = load_model(
            self.path,
            dtype=self.dtype,
            device=device,
            attention=self.attention,
            revision=self.revision,
            trust_remote_code=self.trust_remote_code,
        ).requires_grad_(False)
        self.head = Head.of(self.model, real_ids(self.tokenizer))

    def shape(self) -> ModelShape:
        """Of the loaded model, or else of its config, which needs no weights."""
        if self.model is not None and self.head is not None:
            return shape_of(self.model.config, self.head.vocab_size)
        config = load_config(self.path, revision=self.revision, trust_remote_code=self.trust_remote_code)
        return shape_of(config, real_ids(self.load_tokenizer()))

    @torch.no_grad()
    def annotate(self, batch: Batch, needs: Need) -> TeacherSignal:
        """One pass through the model. Raises ConfigError for attention or relations where the teacher has its own view
        of the batch: they compare every position with every other, so both models must see the same ids."""
        if not needs:
            return TeacherSignal()
        assert self.head is not None, "load() comes before annotate()"
        view = batch.teacher
        if view is not None and needs & (Need.ATTENTION | Need.RELATIONS):
            raise ConfigError(
                "teacher: it reads another prompt or has another tokenizer, but attention and relations are compared "
                "position by position; leave teacher_prompt out of the data, or drop the objectives that need them"
            )
        inputs = (batch if view is None else view).model_inputs()
        with torch.autocast(batch.input_ids.device.type, enabled=False):
            layers = run(self.model, inputs, needs)
            hidden = _at_targets(layers.hidden, view)
            states = layers.hidden_states
            signal = TeacherSignal(
                hidden=hidden,
                head=self.head,
                hidden_states=None if states is None else tuple(_at_targets(layer, view) for layer in states),
                attentions=layers.attentions,
                relations=layers.relations,
                embedding=self.model.get_input_embeddings().weight if Need.HIDDEN in needs else None,
            )
            if view is not None and view.targets is not None:
                assert view.mask is not None, "a view of another tokenizer says which targets are of the answer"
                signal.own_hidden = layers.hidden
                if Need.LOGPROBS in needs:
                    signal.own_logprobs = _logprobs(layers.hidden, self.head, view.targets, view.mask)
            elif Need.LOGPROBS in needs:
                seen = batch.mask if view is None else batch.mask & (view.position >= 0)
                signal.logprobs = _logprobs(hidden, self.head, batch.targets, seen)
        return signal


def _at_targets(hidden: Tensor, view: TeacherView | None) -> Tensor:
    """Hidden states [B, T', D] of the teacher's positions -> [B, T, D] of the student's; 0 where it has none."""
    if view is None:
        return hidden
    index = view.position.clamp(min=0).unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
    return hidden.gather(1, index).masked_fill((view.position < 0).unsqueeze(-1), 0.0)


def _logprobs(hidden: Tensor, head: Head, targets: Tensor, mask: Tensor) -> Tensor:
    """log p(target), [B, T] in float32, 0 where `mask` is False; the head sees a chunk at a time."""
    values = target_logprobs(hidden[mask], head, targets[mask], chunk_size(head.vocab_size, hidden.device))
    return torch.zeros(mask.shape, device=hidden.device).masked_scatter(mask, values)
