"""The suite itself: a Distiller with one mistake, while the objective is right, is caught by the checks of a step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kdcli.api import Batch, TeacherSignal
from kdcli.objective.forward_kl import ForwardKL
from kdcli.train.conformance import models
from kdcli.train.conformance.candidate import Candidate
from kdcli.train.conformance.suite import CHECKS, run
from kdcli.train.distiller import Distiller


class LocalCounts(Distiller):
    """Each micro-batch is divided by its own targets (the mean of means of gradient accumulation, TRL #4719)."""

    def _train(self, batch: Batch, counts: Mapping[str, float]) -> Any:
        return super()._train(batch, self.count(batch))


class PaddingCounted(Distiller):
    """Divided by all positions (TAID's DKD, RRHF's padded length)."""

    def count(self, batch: Batch) -> dict[str, float]:
        return {name: float(batch.mask.numel()) for name in super().count(batch)}


class MaskIgnored(Distiller):
    """Prompt and masked positions are trained on (MambaInLlama #11)."""

    def _train(self, batch: Batch, counts: Mapping[str, float]) -> Any:
        return super()._train(replace(batch, mask=batch.attention_mask), counts)


class PaddingTrained(Distiller):
    """The mask is where an input is, one too many at the end of a row: padding is trained on."""

    def _train(self, batch: Batch, counts: Mapping[str, float]) -> Any:
        return super()._train(replace(batch, mask=batch.mask | ~batch.attention_mask), counts)


class ShiftedTwice(Distiller):
    """Targets are shifted a second time."""

    def _train(self, batch: Batch, counts: Mapping[str, float]) -> Any:
        return super()._train(replace(batch, input_ids=batch.input_ids.roll(1, dims=1)), counts)


class WeightsIgnored(Distiller):
    """Every example counts alike."""

    def _train(self, batch: Batch, counts: Mapping[str, float]) -> Any:
        return super()._train(replace(batch, weight=torch.ones_like(batch.weight)), counts)


class ConstantZero(Distiller):
    """Nothing to train on gives a zero without a graph, whose backward fails (torchtune)."""

    def _train(self, batch: Batch, counts: Mapping[str, float]) -> Any:
        return super()._train(batch, counts) if batch.mask.any() else (torch.zeros(()), {})


class DividedByNothing(Distiller):
    """Nothing to train on gives 0 / 0 (DistiLLM, AKL, ABKD)."""

    def _train(self, batch: Batch, counts: Mapping[str, float]) -> Any:
        loss, metrics = super()._train(batch, counts)
        return loss * counts["tokens"] / torch.tensor(counts["tokens"]), metrics


class PaddedIdsKept(Distiller):
    """Rows of the embeddings that are no tokens take part in the softmax."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        for head in (self.gathered_head, self.teacher.model):  # pyright: ignore
            head.head = replace(head.head, vocab_size=models.PADDED)

    def _shared(self, signal: TeacherSignal) -> int:
        return models.PADDED


class LastChunkLost(Distiller):
    """Targets beyond the last whole chunk are left out."""

    def _train(self, batch: Batch, counts: Mapping[str, float]) -> Any:
        if self.chunk and self.chunk < batch.mask.sum():
            kept = batch.mask.flatten().cumsum(0) <= int(batch.mask.sum()) // self.chunk * self.chunk
            batch = replace(batch, mask=batch.mask & kept.view_as(batch.mask))
        return super()._train(batch, counts)


class FirstTargetOfARowLost(Distiller):
    """The first target of a row is dropped: right for rows of one example, wrong for packed ones."""

    def _train(self, batch: Batch, counts: Mapping[str, float]) -> Any:
        first = batch.mask & (batch.mask.cumsum(1) == 1)
        return super()._train(replace(batch, mask=batch.mask & ~first), counts)


class ReductionIgnored(Distiller):
    """`reduction` is a flag that does nothing: always the mean over targets."""

    def _train(self, batch: Batch, counts: Mapping[str, float]) -> Any:
        known = [(term, term.reduction) for term in self.terms.values()]
        for term, _ in known:
            term.reduction = "token"
        result = super()._train(batch, dict.fromkeys(counts, counts["tokens"]))
        for term, reduction in known:
            term.reduction = reduction
        return result


class MeanOfMeansOfSequences(Distiller):
    """`reduction=sequence` is the mean over micro-batches of their means over sequences."""

    def _train(self, batch: Batch, counts: Mapping[str, float]) -> Any:
        if any(term.reduction == "sequence" for term in self.terms.values()):
            counts = {**counts, "it": 2 * self.count(batch)["it"]}
        return super()._train(batch, counts)


class LowPrecision(Distiller):
    """Gradients of a bfloat16 student are rounded to 4 bits."""

    def _train(self, batch: Batch, counts: Mapping[str, float]) -> Any:
        loss, metrics = super()._train(batch, counts)
        if self.student.head.weight.dtype == torch.bfloat16:

            def rounded(gradient: Tensor) -> Tensor:
                hook.remove()
                step = gradient.abs().max() / 8
                return (gradient / step).round() * step

            hook = self.student.head.weight.register_hook(rounded)
        return loss, metrics


PLANTED: dict[type[Distiller], set[str]] = {
    LocalCounts: {"micro_batches_do_not_matter", "ranks_do_not_matter", "two_processes_are_one"},
    PaddingCounted: {"chunked_is_dense", "packing_does_not_matter"},
    MaskIgnored: {"chunked_is_dense", "nothing_to_train_on", "ranks_do_not_matter"},
    PaddingTrained: {"masked_targets_do_not_matter", "packing_does_not_matter"},
    ShiftedTwice: {"chunked_is_dense"},
    WeightsIgnored: {"chunked_is_dense"},
    ConstantZero: {"nothing_to_train_on"},
    DividedByNothing: {"nothing_to_train_on"},
    PaddedIdsKept: {"padded_vocabulary"},
    LastChunkLost: {"chunks_do_not_matter", "chunked_is_dense"},
    FirstTargetOfARowLost: {"packing_does_not_matter", "chunked_is_dense"},
    LowPrecision: {"bfloat16"},
    ReductionIgnored: {"reductions_are_dense_means"},
    MeanOfMeansOfSequences: {"reductions_are_dense_means"},
}


@pytest.mark.parametrize("wrong", PLANTED, ids=lambda wrong: wrong.__name__)
def test_a_planted_mistake_is_caught_by_the_check_made_for_it(
    wrong: type[Distiller], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "Distiller", wrong)
    caught = {outcome.check for outcome in run(Candidate.of(ForwardKL), only=PLANTED[wrong]).failures}
    assert caught == PLANTED[wrong], wrong.__doc__


def test_every_check_is_needed() -> None:
    """Each catches a mistake planted here or in the modules beside this one."""
    from tests.train.conformance import test_planted, test_planted_sequences, test_planted_states

    planted = (PLANTED, *(module.PLANTED for module in (test_planted, test_planted_sequences, test_planted_states)))
    named = {check for mistakes in planted for checks in mistakes.values() for check in checks}
    assert {check.__name__ for check in CHECKS} == named
