"""The suite itself: wrong objectives, one for each kind of mistake that was found in the field, and who catches them.

Each is a right objective with one thing changed. The sources are in METHODS sections 0, 2 and 6.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from kdcli.api import Batch, Need, Objective, StudentOutput, TeacherSignal, Unit
from kdcli.errors import ConfigError
from kdcli.objective._divergence import Divergence
from kdcli.objective._tempered import Tempered
from kdcli.objective.adaptive_kl import AdaptiveKL
from kdcli.objective.alpha_beta import AlphaBeta
from kdcli.objective.cross_entropy import CrossEntropy
from kdcli.objective.dkd import DKD
from kdcli.objective.forward_kl import ForwardKL
from kdcli.objective.generalized_jsd import GeneralizedJSD
from kdcli.objective.skew_kl import SkewKL
from kdcli.objective.skew_reverse_kl import SkewReverseKL
from kdcli.objective.symmetric_kl import SymmetricKL
from kdcli.ops import divergence as d
from kdcli.ops.support import sparse
from kdcli.train.conformance import oracles
from kdcli.train.conformance.candidate import Candidate
from kdcli.train.conformance.suite import run

Pair = tuple[Tensor, Tensor]


class Plain(Divergence):
    """Forward KL without a closed form: the base of most mistakes."""

    f_divergence = True
    oracle = staticmethod(oracles.forward_kl)

    def divergence(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return d.forward_kl(log_p, log_q)


class Swapped(Plain):
    """Arguments of the KL exchanged (TRL #4935, twinkle #112)."""

    def divergence(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return d.forward_kl(log_q, log_p)


class CrossEntropyCalledKL(Plain):
    """The teacher's entropy is left out (DistiLLM, MiniLLM, torchtune): not zero at p = q."""

    def divergence(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return -(log_p.exp() * log_q).sum(-1)


class MeanOverVocabulary(Plain):
    """`reduction="mean"` divides by V too (TRL, Model-Optimizer, TinyBERT)."""

    def divergence(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return (log_p.exp() * (log_p - log_q)).mean(-1)


class MeanOfMeans(Plain):
    """Divided by the targets at hand, and so by another number in every micro-batch."""

    def divergence(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return d.forward_kl(log_p, log_q) / log_q.shape[-2]


class SummedOverTargets(Plain):
    """Every target gets the sum over all (DSKD's label smoothing is the token count too large)."""

    def divergence(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        value = d.forward_kl(log_p, log_q)
        return value.sum().expand_as(value)


class Reduced(Plain):
    """Returns a scalar: masks and weights can no longer be applied."""

    def forward(self, batch: Batch, student: StudentOutput, teacher: TeacherSignal) -> Tensor:
        return super().forward(batch, student, teacher).mean()


class SignFlipped(Plain):
    """A reward where a loss should be."""

    def divergence(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return -d.forward_kl(log_p, log_q)


class T2InValueOnly(ForwardKL):
    """T squared multiplies the value and not the closed-form gradient (axolotl's Liger path)."""

    def scaled(self, value: Tensor, gradient: Tensor) -> Pair:
        return value * self.scale, gradient / self.temperature


class T2Forgotten(Plain):
    """temperature_scale is a flag that does nothing."""

    @property
    def scale(self) -> float:
        return 1.0


class StudentTemperatureOnly(Plain):
    """The teacher's logits are not divided by T (axolotl, unless they come tempered)."""

    def forward(self, batch: Batch, student: StudentOutput, teacher: TeacherSignal) -> Tensor:
        if teacher.topk is not None:
            return super().forward(batch, student, teacher)
        log_p = teacher.log_p(1.0)
        assert log_p is not None
        return self.scale * self.divergence(log_p, student.log_q(self.temperature))


class TemperatureIgnored(Plain):
    """temperature is accepted and used nowhere in the loss (TRL's GKDTrainer)."""

    def forward(self, batch: Batch, student: StudentOutput, teacher: TeacherSignal) -> Tensor:
        if teacher.topk is not None:
            return super().forward(batch, student, teacher)
        log_p = teacher.log_p(1.0)
        assert log_p is not None
        return self.divergence(log_p, student.log_q(1.0))


class ChainRuleForgotten(ForwardKL):
    """The closed form is right at T = 1 and lacks 1 / T elsewhere."""

    def scaled(self, value: Tensor, gradient: Tensor) -> Pair:
        return value * self.scale, gradient * self.scale


class TruncatedTopK(Plain):
    """The raw sum over the K ids, with no word of the rest (axolotl, verl, NeMo-RL): it goes below zero."""

    def forward(self, batch: Batch, student: StudentOutput, teacher: TeacherSignal) -> Tensor:
        topk = teacher.topk
        if topk is None:
            return super().forward(batch, student, teacher)
        log_q = student.log_q(self.temperature).gather(-1, topk.ids)
        return self.scale * (topk.logprobs.exp() * (topk.logprobs - log_q)).sum(-1)


class RenormalisedTopK(Plain):
    """Both sides renormalised over the K ids (TRL's tail = 0, OPSD): identically 0 at K = 1, no bound for others."""

    def forward(self, batch: Batch, student: StudentOutput, teacher: TeacherSignal) -> Tensor:
        topk = teacher.topk
        if topk is None:
            return super().forward(batch, student, teacher)
        pair = sparse(topk.ids, topk.logprobs, student.log_q(self.temperature), "renormalize")
        return self.scale * self.divergence(*pair)


class TopKOrderTaken(Plain):
    """The cached entries are taken for the ids 0, 1, 2, ..."""

    def forward(self, batch: Batch, student: StudentOutput, teacher: TeacherSignal) -> Tensor:
        topk = teacher.topk
        if topk is None:
            return super().forward(batch, student, teacher)
        ids = torch.arange(topk.ids.shape[-1]).expand_as(topk.ids)
        return self.scale * self.divergence(*sparse(ids, topk.logprobs, student.log_q(self.temperature)))


class SparseGradient(ForwardKL):
    """verl's hand-written q - p over the teacher's likeliest ids, where the rest's mass times q is missing."""

    def divergence_gradient(self, log_p: Tensor, log_q: Tensor) -> Pair:
        kept = torch.zeros_like(log_p).scatter(-1, log_p.topk(5).indices, 1.0)
        return d.forward_kl(log_p, log_q), log_q.exp() - kept * log_p.exp()


class LogOfSoftmax(Plain):
    """log(softmax(z)): minus infinity, then NaN, where float32 underflows (the `mixed_probs` of DistiLLM and TAID)."""

    def divergence(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        p, q = log_p.exp(), log_q.exp()
        return (p * (p.log() - q.log())).sum(-1)


class Epsilon(Plain):
    """log(q + 1e-9): finite, and wrong below it (DSKD)."""

    def divergence(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        p, q = log_p.exp(), log_q.exp()
        return (p * ((p + 1e-9).log() - (q + 1e-9).log())).sum(-1)


class Clamped(Plain):
    """A clamp on the log-ratio hides large losses and their gradients."""

    def divergence(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return (log_p.exp() * (log_p - log_q).clamp(max=10.0)).sum(-1)


class NanHidden(Plain):
    """Large values silently replaced."""

    def divergence(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        value = d.forward_kl(log_p, log_q)
        return torch.where(value > 20, torch.zeros_like(value), value)


class HalfPrecision(Plain):
    """Computed in bfloat16 (DPKD's and ORPO's official code)."""

    def divergence(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return d.forward_kl(log_p.bfloat16(), log_q.bfloat16()).to(log_q.dtype)


class HalfOfSingle(Plain):
    """float32 is lowered to bfloat16, as autocast does, and float64 is not."""

    def divergence(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        if log_q.dtype == torch.float32:
            return d.forward_kl(log_p.bfloat16(), log_q.bfloat16()).float()
        return d.forward_kl(log_p, log_q)


class Detached(Plain):
    """The value is right and has no graph (torchtune's constant 0)."""

    def forward(self, batch: Batch, student: StudentOutput, teacher: TeacherSignal) -> Tensor:
        return super().forward(batch, student, teacher).detach()


class SilentlyDetachedMixture(Divergence):
    """Stops the gradient at the mixture without a word of it (DistiLLM-2's code beside DistiLLM's name)."""

    oracle = staticmethod(oracles.skew_reverse_kl)
    alpha = 0.3

    def __init__(self, *, alpha: float = 0.3, **settings: Any) -> None:
        super().__init__(**settings)
        self.alpha = alpha

    def divergence(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return d.skew_reverse_kl(log_p, log_q, self.alpha, detach_mixture=True)


class WrongShareInMixture(SkewKL):
    """alpha is taken for the student's share."""

    oracle = staticmethod(oracles.skew_kl)

    def divergence(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return d.skew_kl(log_p, log_q, 1 - self.alpha)

    def divergence_gradient(self, log_p: Tensor, log_q: Tensor) -> Pair:
        return d.skew_kl_gradient(log_p, log_q, 1 - self.alpha)


class StudentsBeta(GeneralizedJSD):
    """beta weights the student (DistiLLM, KDFlow, TRL before #3043): invisible at the default of 1/2."""

    oracle = staticmethod(oracles.generalized_jsd)

    def divergence(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return d.generalized_jsd(log_p, log_q, 1 - self.beta)

    def divergence_gradient(self, log_p: Tensor, log_q: Tensor) -> Pair:
        return d.generalized_jsd_gradient(log_p, log_q, 1 - self.beta)


class JumpAtTheEnds(Divergence):
    """beta = 0 and 1 are special-cased to the KLs where the formula tends to 0 (TRL, Liger, ms-swift)."""

    def __init__(self, *, beta: float = 0.5, **settings: Any) -> None:
        super().__init__(**settings)
        if not 0 <= beta <= 1:
            raise ConfigError("beta")
        self.beta = beta

    def divergence(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        if self.beta in (0.0, 1.0):
            return d.forward_kl(log_p, log_q) if self.beta == 0 else d.reverse_kl(log_p, log_q)
        return d.generalized_jsd(log_p, log_q, self.beta)


class WrongLimit(AlphaBeta):
    """1 / beta where the limit at alpha = 0 has 1 / beta squared (ABKD): right at beta = 1, a jump elsewhere."""

    def divergence(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        value = super().divergence(log_p, log_q)
        return value * self.beta if self.alpha == 0 and self.beta != 0 else value

    def divergence_gradient(self, log_p: Tensor, log_q: Tensor) -> None:  # type: ignore[override]
        return None


class ReverseWeight(SymmetricKL):
    """forward_weight weights the reverse KL (DistiLLM's lam, verl's rkl_ratio)."""

    oracle = staticmethod(oracles.symmetric_kl)

    def divergence(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return d.symmetric_kl(log_p, log_q, 1 - self.forward_weight)

    def divergence_gradient(self, log_p: Tensor, log_q: Tensor) -> None:  # type: ignore[override]
        return None


class ZeroOverZero(AdaptiveKL):
    """The head's share is 0 / 0 at p = q: NaN in the first step of a student that starts as its teacher (AKL)."""

    def divergence(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        gap = (log_p.exp() - log_q.exp()).abs().detach()
        weight = gap.max(-1).values / gap.sum(-1)
        return weight * d.forward_kl(log_p, log_q) + (1 - weight) * d.reverse_kl(log_p, log_q)

    def divergence_gradient(self, log_p: Tensor, log_q: Tensor) -> None:  # type: ignore[override]
        return None


class WeightsWithGradient(AdaptiveKL):
    """The adaptive weight is not detached (TAID's AKL)."""

    def divergence(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        gap = (log_p.exp() - log_q.exp()).abs()
        head = (log_p >= log_p.topk(3).values[..., -1:]).to(gap.dtype)
        weight = (gap * head).sum(-1) / gap.sum(-1).clamp(min=1e-30)
        return weight * d.forward_kl(log_p, log_q) + (1 - weight) * d.reverse_kl(log_p, log_q)


class MaskOfAThousand(DKD):
    """The target is left out by subtracting 1000 from its logit (mdistiller): not enough where logits are larger."""

    oracle = staticmethod(oracles.dkd)

    def forward(self, batch: Batch, student: StudentOutput, teacher: TeacherSignal) -> Tensor:
        log_p, log_q = self.dense_log_p(teacher), student.log_q(self.temperature)
        target = torch.nn.functional.one_hot(batch.targets, log_q.shape[-1])
        others = [torch.log_softmax(one - 1000 * target, -1) for one in (log_p, log_q)]
        binary = d.decoupled_kl(log_p, log_q, batch.targets, self.alpha, 0.0)
        return self.scale * (binary + self.beta * d.forward_kl(*others))

    def closed_form(self, batch: Batch, student: StudentOutput, teacher: TeacherSignal) -> None:  # type: ignore[override]
        return None


class RawLogits(Tempered):
    """Squared difference of logits as they come: a common offset, which no softmax sees, is trained on."""

    def forward(self, batch: Batch, student: StudentOutput, teacher: TeacherSignal) -> Tensor:
        assert student.logits is not None
        if teacher.logits is None:
            raise ConfigError("dense only")
        return self.scale * ((student.logits - teacher.logits) / self.temperature).square().mean(-1)


class PaddedWithZero(Plain):
    """The student's vocabulary is padded with a logit of 0, which is a token of weight e^0 (Liger)."""

    def forward(self, batch: Batch, student: StudentOutput, teacher: TeacherSignal) -> Tensor:
        if teacher.topk is not None or student.logits is None or teacher.logits is None:
            return super().forward(batch, student, teacher)
        z = torch.nn.functional.pad(student.logits, (0, 1))
        log_q = torch.log_softmax(z / self.temperature, -1)[..., :-1]
        return self.scale * d.forward_kl(torch.log_softmax(teacher.logits / self.temperature, -1), log_q)


class FirstIdLost(Plain):
    """Id 0 is taken for a placeholder (verl under tensor parallelism)."""

    def divergence(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return d.forward_kl(log_p[..., 1:], log_q[..., 1:])


class Unshifted(CrossEntropy):
    """A second shift: the target before the right one (GOLD's `observed`, DistillKit's masks)."""

    oracle = staticmethod(oracles.cross_entropy)

    def forward(self, batch: Batch, student: StudentOutput, teacher: TeacherSignal) -> Tensor:
        log_q = student.log_q()
        return -log_q.gather(-1, batch.input_ids.unsqueeze(-1)).squeeze(-1)

    def closed_form(self, batch: Batch, student: StudentOutput, teacher: TeacherSignal) -> None:  # type: ignore[override]
        return None


class SmoothingOverOthers(CrossEntropy):
    """fairseq's e / (V - 1) under the name of torch's e / V."""

    oracle = staticmethod(oracles.cross_entropy)

    def forward(self, batch: Batch, student: StudentOutput, teacher: TeacherSignal) -> Tensor:
        log_q, e = student.log_q(), self.label_smoothing
        own = -log_q.gather(-1, batch.targets.unsqueeze(-1)).squeeze(-1)
        return (1 - e) * own + e * (-log_q.sum(-1) - own) / (log_q.shape[-1] - 1)

    def closed_form(self, batch: Batch, student: StudentOutput, teacher: TeacherSignal) -> None:  # type: ignore[override]
        return None


class WeightTwice(Plain):
    """Multiplied by its weight here, and by the Distiller again."""

    def divergence(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return self.weight * d.forward_kl(log_p, log_q)


class DomainsDropped(Plain):
    """The constructor takes domains and forgets them: the term trains everywhere."""

    def __init__(self, *, domains: Sequence[str] = (), **settings: Any) -> None:
        del domains
        super().__init__(**settings)


class WritesIntoShared(ForwardKL):
    """The closed form works in place on log-probabilities that the next term reads (ULD overwrites logits)."""

    def divergence_gradient(self, log_p: Tensor, log_q: Tensor) -> Pair:
        return d.forward_kl(log_p, log_q), log_q.exp_().sub_(log_p.exp())


class StepsByItself(Plain):
    """A schedule that moves with every call, so with every micro-batch (TAID's official update)."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.calls = 0

    def divergence(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        self.calls += 1
        return d.forward_kl(log_p, log_q) * (1 + 0.01 * self.calls)


class Dropout(Plain):
    """Random: two calls differ."""

    def divergence(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return d.forward_kl(log_p, log_q) * (1 + 0.01 * torch.rand(()).to(log_q.dtype))


class StateLost(Plain):
    """A factor learned from the data, which no checkpoint holds."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.factor: float | None = None

    def divergence(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        value = d.forward_kl(log_p, log_q)
        if self.factor is None:
            self.factor = float(value.detach().flatten()[0])
        return value * self.factor


class ChunkMaximum(Objective):
    """Positions scaled by the largest value of the chunk: depends on the chunk's size (a batch statistic)."""

    needs = Need.DISTRIBUTION

    def forward(self, batch: Batch, student: StudentOutput, teacher: TeacherSignal) -> Tensor:
        log_p = teacher.log_p()
        assert log_p is not None
        value = d.forward_kl(log_p, student.log_q())
        return value / value.detach().max().clamp(min=1e-9)


class NoLoss(Plain):
    """Zero for every student: a flag that does nothing."""

    def divergence(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return d.forward_kl(log_p, log_q) * 0


class FalseClaim(SkewReverseKL):
    """Says that its mixture is detached, and lets the gradient through in the closed form."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{**settings, "detach_mixture": True})

    def divergence_gradient(self, log_p: Tensor, log_q: Tensor) -> Pair:
        return d.skew_reverse_kl_gradient(log_p, log_q, self.alpha, False)


class NotAnFDivergence(Plain):
    """Claims to be an f-divergence: merging ids may raise a squared distance."""

    def divergence(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return (log_p.exp() - log_q.exp()).square().sum(-1)


PLANTED: dict[type[Objective], set[str]] = {
    Swapped: {"equals_oracle"},
    CrossEntropyCalledKL: {"zero_at_teacher", "equals_oracle"},
    MeanOverVocabulary: {"equals_oracle", "top_k_bound"},
    MeanOfMeans: {"units_are_independent", "chunks_do_not_matter", "micro_batches_do_not_matter"},
    SummedOverTargets: {"units_are_independent", "finite_differences"},
    Reduced: {"one_number_per_unit"},
    SignFlipped: {"positive_elsewhere", "loss_falls"},
    T2InValueOnly: {"t2_scales_value_and_gradient"},
    T2Forgotten: {"t2_scales_value_and_gradient"},
    StudentTemperatureOnly: {"temperature_divides_both_logits", "zero_at_teacher"},
    TemperatureIgnored: {"temperature_divides_both_logits"},
    ChainRuleForgotten: {"closed_form_is_autograd", "temperature_divides_both_logits"},
    TruncatedTopK: {"top_k_bound"},
    RenormalisedTopK: {"sparse_teacher"},
    TopKOrderTaken: {"sparse_teacher"},
    SparseGradient: {"closed_form_is_autograd", "logit_offset"},
    LogOfSoftmax: {"saturated_inputs"},
    Epsilon: {"equals_oracle"},
    Clamped: {"equals_oracle"},
    NanHidden: {"equals_oracle"},
    HalfPrecision: {"equals_oracle", "finite_differences"},
    HalfOfSingle: {"float32", "saturated_inputs"},
    Detached: {"finite_differences"},
    SilentlyDetachedMixture: {"finite_differences"},
    WrongShareInMixture: {"equals_oracle"},
    StudentsBeta: {"equals_oracle"},
    JumpAtTheEnds: {"continuous_in_settings"},
    WrongLimit: {"continuous_in_settings"},
    ReverseWeight: {"equals_oracle"},
    ZeroOverZero: {"zero_at_teacher"},
    WeightsWithGradient: {"closed_form_is_autograd"},
    MaskOfAThousand: {"equals_oracle"},
    RawLogits: {"logit_offset"},
    PaddedWithZero: {"logit_offset", "zero_at_teacher"},
    FirstIdLost: {"vocabulary_order"},
    Unshifted: {"equals_oracle"},
    SmoothingOverOthers: {"equals_oracle"},
    WeightTwice: {"weight_and_domains_are_left_alone"},
    DomainsDropped: {"weight_and_domains_are_left_alone"},
    WritesIntoShared: {"inputs_stay_as_they_are"},
    StepsByItself: {"inputs_stay_as_they_are"},
    Dropout: {"inputs_stay_as_they_are"},
    StateLost: {"state_is_restored"},
    ChunkMaximum: {"units_are_independent", "chunks_do_not_matter"},
    NoLoss: {"positive_elsewhere", "loss_falls"},
    FalseClaim: {"closed_form_is_autograd"},
    NotAnFDivergence: {"top_k_bound"},
}


def test_what_the_mistakes_are_made_in_is_right() -> None:
    verdict = run(Candidate.of(Plain))
    assert not verdict.failures
    assert sum(outcome.applies for outcome in verdict.outcomes) >= 25


@pytest.mark.parametrize("wrong", PLANTED, ids=lambda wrong: wrong.__name__)
def test_a_planted_mistake_is_caught_by_the_check_made_for_it(wrong: type[Objective]) -> None:
    caught = {outcome.check for outcome in run(Candidate.of(wrong), only=PLANTED[wrong]).failures}
    assert caught == PLANTED[wrong], wrong.__doc__


class Learned(Plain):
    """A parameter of its own, random at first, that no target shares with another."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.gain = torch.nn.Parameter(torch.rand(()))

    def divergence(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return d.forward_kl(log_p, log_q) * (1 + self.gain.square())

    oracle = None  # type: ignore[assignment]


def test_an_objective_with_parameters_of_its_own_passes() -> None:
    verdict = run(Candidate.of(Learned))
    assert not verdict.failures
    assert "equals_oracle" not in {outcome.check for outcome in verdict.outcomes if outcome.applies}


class Refusing(SkewKL):
    """Refuses settings with an error of Python's own."""

    oracle = staticmethod(oracles.skew_kl)

    def __init__(self, *, alpha: float = 0.1, **settings: Any) -> None:
        if not 0 <= alpha < 1:
            raise ValueError("alpha")
        super().__init__(alpha=alpha, **settings)


def test_settings_are_varied_as_far_as_the_constructor_takes_them() -> None:
    """A whole number, as typed on a command line, is varied like the real one that it stands for."""
    candidate = Candidate.of(Refusing, alpha=0)
    assert candidate.numbers() == ["alpha"]
    varied = [changes["alpha"] for changes in candidate.variants() if "alpha" in changes]
    assert varied == [0.0, 0.3]
    assert not run(candidate).failures


class PerSequence(ForwardKL):
    unit = Unit.SEQUENCE


def test_an_objective_that_returns_another_unit_than_it_says_is_caught() -> None:
    caught = {outcome.check for outcome in run(Candidate.of(PerSequence)).failures}
    assert {"one_number_per_unit", "chunks_do_not_matter"} <= caught


def test_a_check_that_raises_has_failed_with_its_error_in_the_note() -> None:
    outcome = next(o for o in run(Candidate.of(Detached), only=["finite_differences"]).outcomes)
    assert outcome.failed
    assert "does not require grad" in outcome.note


def test_the_suite_leaves_the_callers_random_numbers_and_threads_alone() -> None:
    torch.manual_seed(3)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    run(Candidate.of(ForwardKL))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
