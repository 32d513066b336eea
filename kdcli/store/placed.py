"""Models that do not simply go on with a text: what they read of a batch, and their states at the student's positions.

A row's prompt ends where its first target is predicted; what stands behind is the answer: a label, or the response.
Letters: T' positions of the ids that the model at hand reads (the teacher may have its own), R of a response.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kdcli.api import Batch, Need, Relations
from kdcli.errors import ConfigError
from kdcli.store.layers import Layers, run
from kdcli.store.read import what_reads

COUNT_FROM_PADDING = ("roberta", "camembert", "xlm_roberta", "mpnet", "longformer")  # first position: padding + 1


@dataclass(frozen=True)
class Reading:
    """What a model reads of a batch, and where it predicts the student's targets."""

    input_ids: Tensor  # [B, T']
    attention_mask: Tensor  # [B, T'] bool
    position: Tensor  # [B, T] index into T' of the prediction for the student's target; -1 where none

    @classmethod
    def by_student(cls, batch: Batch) -> Reading:
        places = torch.arange(batch.mask.shape[1], device=batch.mask.device).expand_as(batch.mask)
        return cls(batch.input_ids, batch.attention_mask, places.masked_fill(~batch.mask, -1))

    @classmethod
    def by_teacher(cls, batch: Batch) -> Reading:
        view = batch.teacher
        if view is None:
            return cls.by_student(batch)
        return cls(view.input_ids, view.attention_mask, view.position.masked_fill(~batch.mask, -1))

    def last_of_prompt(self) -> Tensor:
        """[B]: where the first target is predicted; of a row without targets the last position but one."""
        found = self.position >= 0
        length = self.input_ids.shape[1]
        first = self.position.masked_fill(~found, length).amin(1)
        return torch.where(found.any(1), first, self.attention_mask.sum(1) - 2).clamp(min=0)


def encode(model: Any, reading: Reading, needs: Need, separator: int | None) -> Layers:
    """An encoder's states of the prompt, at its own positions: every position of it predicts something. 0 elsewhere."""
    kept = reading.position >= 0
    kept = torch.where(kept.any(1, keepdim=True), kept, _prompt(reading))
    layers = run(model, _inputs(model, reading, kept, separator), needs)
    blank, more = ~kept.unsqueeze(-1), kept.shape[1] - layers.hidden.shape[1]

    def whole(states: Tensor) -> Tensor:
        """[B, T - more, …] -> [B, T, …], 0 where nothing is kept."""
        return nn.functional.pad(states, (0, 0) * (states.ndim - 2) + (0, more))

    states, attentions, relations = layers.hidden_states, layers.attentions, layers.relations
    return Layers(
        hidden=whole(layers.hidden).masked_fill(blank, 0.0),
        hidden_states=None if states is None else tuple(whole(one).masked_fill(blank, 0.0) for one in states),
        attentions=None
        if attentions is None
        else tuple(nn.functional.pad(one, (0, more, 0, more)) for one in attentions),
        relations=None
        if relations is None
        else tuple(
            Relations(queries=whole(one.queries), keys=whole(one.keys), values=whole(one.values)) for one in relations
        ),
    )


def classify(model: Any, head: nn.Linear, reading: Reading, needs: Need, separator: int | None) -> Layers:
    """A classifier's pass over the prompt: what its last linear layer reads, at the position of the label. With HIDDEN
    also each layer's state of the token that stands for the text: the first, as in BERT, or the last where the head
    reads every token."""
    inputs = _inputs(model, reading, _prompt(reading), separator)
    with what_reads(model, head) as seen:
        output = model(**inputs, output_hidden_states=Need.HIDDEN in needs)
    (found,) = seen
    read = found.given
    rows = torch.arange(len(read), device=read.device)
    last = reading.last_of_prompt()
    every = read.ndim == 3
    found.prove(model, output.logits, row=last if every else None)
    place = last if every else torch.zeros_like(last)
    states = output.hidden_states if Need.HIDDEN in needs else None
    at_label = (reading.position >= 0).unsqueeze(-1)

    def placed(vectors: Tensor) -> Tensor:
        """[B, D] -> [B, T, D], 0 where there is no label."""
        return torch.where(at_label, vectors.unsqueeze(1), vectors.new_zeros(()))

    return Layers(
        hidden=placed(read[rows, last] if every else read),
        hidden_states=None if states is None else tuple(placed(one[rows, place]) for one in states),
    )


def write(model: Any, reading: Reading, needs: Need) -> Layers:
    """An encoder-decoder's pass: the encoder reads the prompt, the decoder the response behind its start token; what
    its head reads, and with HIDDEN the decoder's layers, at the positions that predict the response."""
    last, found = reading.last_of_prompt(), reading.position >= 0
    width = int(last.max()) + 1
    prompt = torch.arange(width, device=last.device) <= last.unsqueeze(1)
    steps = torch.arange(max(1, int(found.sum(1).max())), device=last.device)
    places = (last.unsqueeze(1) + steps).clamp(max=reading.input_ids.shape[1] - 1)  # [B, R]
    fed = reading.input_ids.gather(1, places)
    fed[:, 0] = decoder_start(model.config)
    head = model.get_output_embeddings()
    with what_reads(model, head, empty=True) as seen:
        output = model(
            input_ids=reading.input_ids[:, :width].masked_fill(~prompt, _padding(model)),
            attention_mask=prompt.long(),
            decoder_input_ids=fed,
            use_cache=False,
            output_hidden_states=Need.HIDDEN in needs,
        )
    seen[0].prove(model, output.logits, bias=getattr(model, "final_logits_bias", None))
    index = (reading.position - last.unsqueeze(1)).clamp(min=0, max=len(steps) - 1).unsqueeze(-1)

    def placed(states: Tensor) -> Tensor:
        """[B, R, D] -> [B, T, D], 0 where nothing is predicted."""
        moved = states.gather(1, index.expand(-1, -1, states.shape[-1]))
        return moved.masked_fill(~found.unsqueeze(-1), 0.0)

    states = output.decoder_hidden_states if Need.HIDDEN in needs else None
    return Layers(
        hidden=placed(seen[0].given), hidden_states=None if states is None else tuple(placed(one) for one in states)
    )


def decoder_start(config: Any) -> int:
    """The id that a decoder begins with. Raises ConfigError where the config names none."""
    start = getattr(config, "decoder_start_token_id", None)
    start = getattr(config, "pad_token_id", None) if start is None else start
    if start is None:
        raise ConfigError("the model's config has no decoder_start_token_id, so its decoder cannot begin; set it there")
    return int(start)


def _prompt(reading: Reading) -> Tensor:
    """[B, T'] bool."""
    places = torch.arange(reading.input_ids.shape[1], device=reading.input_ids.device)
    return places <= reading.last_of_prompt().unsqueeze(1)


def _padding(model: Any) -> int:
    return getattr(model.config, "pad_token_id", None) or 0


def _inputs(model: Any, reading: Reading, kept: Tensor, separator: int | None) -> dict[str, Any]:
    """What an encoder is given: of what is not `kept` nothing but padding, which positions are counted by."""
    config = model.config
    limit = getattr(config, "max_position_embeddings", None) or 0
    limit -= _padding(model) + 1 if getattr(model, "base_model_prefix", "") in COUNT_FROM_PADDING else 0
    longest = int(kept.sum(1).max())
    if 0 < limit < longest:
        raise ConfigError(
            f"batch.max_length: {type(model).__name__} reads at most {limit} tokens, and a row has {longest}; set "
            f"batch.max_length={limit + 1} (the label counts as one)"
        )
    kept = kept[:, : max(longest, 1)]  # a column behind the longest row may have no position
    ids = reading.input_ids[:, : max(longest, 1)].masked_fill(~kept, _padding(model))
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": kept.long()}
    if separator is not None and (getattr(config, "type_vocab_size", 0) or 0) > 1:
        ends = ids == separator
        inputs["token_type_ids"] = ((ends.cumsum(1) - ends.long() > 0) & kept).long()  # 1 behind the first separator
    return inputs
