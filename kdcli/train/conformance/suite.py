"""All checks in order, and their results for one objective."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch

from kdcli.train.conformance import gradients, logits, processes, settings, steps, values
from kdcli.train.conformance.candidate import Candidate, Measure, NotApplicable

Check = Callable[[Candidate], Measure]

CHECKS: tuple[Check, ...] = (
    values.one_number_per_unit,
    values.units_are_independent,
    values.packing_is_padding,
    values.equals_oracle,
    values.zero_at_teacher,
    values.positive_elsewhere,
    gradients.finite_differences,
    gradients.closed_form_is_autograd,
    logits.vocabulary_order,
    logits.logit_offset,
    logits.temperature_divides_both_logits,
    logits.t2_scales_value_and_gradient,
    values.padding_holds_anything,
    values.saturated_inputs,
    values.float32,
    logits.sparse_teacher,
    logits.top_k_bound,
    settings.continuous_in_settings,
    settings.settings_are_read_at_use,
    settings.weight_and_domains_are_left_alone,
    settings.inputs_stay_as_they_are,
    settings.state_is_restored,
    steps.chunks_do_not_matter,
    steps.chunked_is_dense,
    steps.reductions_are_dense_means,
    steps.micro_batches_do_not_matter,
    steps.ranks_do_not_matter,
    processes.two_processes_are_one,
    steps.packing_does_not_matter,
    steps.masked_targets_do_not_matter,
    steps.nothing_to_train_on,
    steps.padded_vocabulary,
    steps.bfloat16,
    steps.loss_falls,
)


@dataclass(frozen=True)
class Outcome:
    """One check of one objective: passed, failed, or (with a reason in `note`) not applicable."""

    check: str
    claim: str
    error: float = 0.0
    bound: float = 0.0
    applies: bool = True
    note: str = ""

    @property
    def passed(self) -> bool:
        return self.applies and self.error <= self.bound  # false for a NaN

    @property
    def failed(self) -> bool:
        return self.applies and not self.passed


@dataclass(frozen=True)
class Verdict:
    """What the suite found for one objective."""

    objective: str
    outcomes: tuple[Outcome, ...]
    seconds: float

    @property
    def failures(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.failed]


def run(candidate: Candidate, only: Collection[str] = ()) -> Verdict:
    """Every check on one objective, or those of the names `only`. A check that raises has failed, and its note is the
    error."""
    begin, threads = time.perf_counter(), torch.get_num_threads()
    torch.set_num_threads(1)  # of tensors this small, threads only wait for each other
    try:
        outcomes = [outcome_of(check, candidate) for check in CHECKS if not only or name_of(check) in only]
    finally:
        torch.set_num_threads(threads)
    return Verdict(candidate.name, tuple(outcomes), time.perf_counter() - begin)


def outcome_of(check: Check, candidate: Candidate) -> Outcome:
    """One check; random numbers are the same for every check and leave the caller's generator alone."""
    name, claim = name_of(check), " ".join((check.__doc__ or "").split())
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            measure = check(candidate)
    except NotApplicable as reason:
        return Outcome(name, claim, applies=False, note=str(reason))
    except Exception as error:
        return Outcome(name, claim, error=float("inf"), note=f"{type(error).__name__}: {error}")
    return Outcome(name, claim, measure.error, measure.bound)


def name_of(check: Check) -> str:
    return getattr(check, "__name__", str(check))
