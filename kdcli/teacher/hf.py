"""A frozen transformers causal language model that hands out hidden states and its head, never dense logits."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from kdcli.api import Batch, Need, Teacher, TeacherSignal, TeacherView
from kdcli.ops.chunked import chunk_size
from kdcli.ops.head import Head
from kdcli.store.models import load_model, load_tokenizer


class HFTeacher(Teacher):
    """A folder, a hub id, `recipes://…` or a GGUF file (`package://DISTRIBUTION/FILE.gguf`), loaded in `dtype`.

    The signal holds the hidden states [B, T, D] that predict each target, and the head cut to the tokenizer's
    real ids. Its arithmetic is `dtype`'s, whatever the student is trained in.
    """

    provides = Need.DISTRIBUTION | Need.LOGITS | Need.LOGPROBS | Need.HIDDEN

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
        self.head = Head.of(self.model, 1 + max(self.tokenizer.get_vocab().values()))

    @torch.no_grad()
    def annotate(self, batch: Batch, needs: Need) -> TeacherSignal:
        if not needs:
            return TeacherSignal()
        assert self.head is not None, "load() comes before annotate()"
        view = batch.teacher
        inputs = (batch if view is None else view).model_inputs()
        with torch.autocast(batch.input_ids.device.type, enabled=False):
            output = self.model.base_model(**inputs, output_hidden_states=Need.HIDDEN in needs)
            hidden = _at_targets(output.last_hidden_state, view)
            return TeacherSignal(
                hidden=hidden,
                head=self.head,
                logprobs=_target_logprobs(hidden, self.head, batch) if Need.LOGPROBS in needs else None,
                hidden_states=tuple(_at_targets(layer, view) for layer in output.hidden_states)
                if Need.HIDDEN in needs
                else None,
            )


def _at_targets(hidden: Tensor, view: TeacherView | None) -> Tensor:
    """Hidden states [B, T', D] of the teacher's positions -> [B, T, D] of the student's; 0 where it has none."""
    if view is None:
        return hidden
    index = view.position.clamp(min=0).unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
    return hidden.gather(1, index) * (view.position >= 0).unsqueeze(-1)


def _target_logprobs(hidden: Tensor, head: Head, batch: Batch) -> Tensor:
    """log p(target) [B, T] in float32, 0 where a target is not supervised; the head sees a chunk at a time."""
    size = chunk_size(head.vocab_size, hidden.device)
    chunks = zip(hidden[batch.mask].split(size), batch.targets[batch.mask].split(size), strict=True)
    values = [torch.log_softmax(head(h), dim=-1).gather(-1, t.unsqueeze(-1))[:, 0] for h, t in chunks]
    logprobs = torch.zeros(batch.mask.shape, device=hidden.device)
    return logprobs.masked_scatter(batch.mask, torch.cat(values))
