"""Toy models and batches for tests of mathematics: real transformers architectures, random weights, no files."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from kdcli.api import Batch, Need, Student, StudentOutput, Teacher, TeacherSignal
from kdcli.ops.head import Head

VOCAB = 33


def llama(seed: int, *, layers: int = 2, width: int = 16, vocab: int = VOCAB, tied: bool = True) -> LlamaForCausalLM:
    """A random Llama with logits far from uniform, so that losses and gradients are not tiny."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=vocab,
            max_position_embeddings=64,
            tie_word_embeddings=tied,
            initializer_range=0.3,
        )
    )
    return model


class ToyStudent(Student):
    def __init__(self, model: Any, vocab_size: int | None = None) -> None:
        super().__init__()
        self.model = model
        self.head = Head.of(model, vocab_size)

    def load(self, device: torch.device) -> None: ...

    def forward(self, batch: Batch) -> Tensor:
        return self.model.base_model(**batch.model_inputs()).last_hidden_state

    def states(self, batch: Batch, needs: Need) -> StudentOutput:
        output = self.model.base_model(**batch.model_inputs(), output_hidden_states=True)
        return StudentOutput(
            hidden=output.last_hidden_state, hidden_states=output.hidden_states if Need.HIDDEN in needs else None
        )


class ToyTeacher(Teacher):
    provides = Need.DISTRIBUTION | Need.LOGITS

    def __init__(self, model: Any, vocab_size: int | None = None) -> None:
        self.model = model.eval().requires_grad_(False)
        self.head = Head.of(model, vocab_size)

    @torch.no_grad()
    def annotate(self, batch: Batch, needs: Need) -> TeacherSignal:
        if not needs & (Need.DISTRIBUTION | Need.LOGITS):
            return TeacherSignal()
        hidden = self.model.base_model(**batch.model_inputs()).last_hidden_state
        return TeacherSignal(hidden=hidden, head=self.head)


def batch(
    seed: int = 0, *, rows: int = 4, length: int = 12, vocab: int = VOCAB, domains: tuple[str, ...] = ("a", "b")
) -> Batch:
    """`rows` examples of different lengths, prompts masked, right-padded."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocab, (rows, length + 1), generator=generator)
    mask = torch.zeros(rows, length, dtype=torch.bool)
    attention = torch.zeros(rows, length, dtype=torch.bool)
    for row in range(rows):
        end = length - row % 3
        mask[row, 2 + row % 2 : end] = True
        attention[row, : end + 1] = True
    segment = torch.arange(rows)[:, None].expand(rows, length).masked_fill(~attention, -1)
    return Batch(
        input_ids=ids[:, :-1],
        targets=ids[:, 1:],
        mask=mask,
        attention_mask=attention,
        segment=segment,
        weight=torch.ones(rows),
        row=[f"row{seed}-{i}" for i in range(rows)],
        domain=[domains[i % len(domains)] for i in range(rows)],
        group=[None] * rows,
        score=[None] * rows,
    )


def rows_of(whole: Batch, start: int, stop: int) -> Batch:
    """Rows start..stop of an unpacked batch, as a batch."""
    window = slice(start, stop)
    return Batch(
        input_ids=whole.input_ids[window],
        targets=whole.targets[window],
        mask=whole.mask[window],
        attention_mask=whole.attention_mask[window],
        segment=torch.where(whole.segment[window] < 0, -1, whole.segment[window] - start),
        weight=whole.weight[window],
        row=whole.row[window],
        domain=whole.domain[window],
        group=whole.group[window],
        score=whole.score[window],
    )
