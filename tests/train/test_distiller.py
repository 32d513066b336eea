"""The Distiller against a dense reference, and what the loss of a step must not depend on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from kdcli.api import (
    Batch,
    Need,
    Objective,
    Reduction,
    Scope,
    StudentOutput,
    Teacher,
    TeacherSignal,
    TeacherView,
    Unit,
)
from kdcli.errors import ConfigError
from kdcli.objective.cross_entropy import CrossEntropy
from kdcli.objective.forward_kl import ForwardKL
from kdcli.objective.generalized_jsd import GeneralizedJSD
from kdcli.objective.reverse_kl import ReverseKL
from kdcli.store.layers import shape_of
from kdcli.train.distiller import Distiller
from tests import toys


def make(tied: bool = True, chunk: int | None = None, **objectives: Objective) -> Distiller:
    student = toys.ToyStudent(toys.llama(1, tied=tied))
    teacher = toys.ToyTeacher(toys.llama(2, layers=3, width=24))
    return Distiller(
        student, teacher, objectives or {"kd": ForwardKL(temperature=2.0), "ce": CrossEntropy(weight=0.5)}, chunk
    )


def step(distiller: Distiller, micro_batches: Sequence[Batch]) -> tuple[float, dict[str, float], dict[str, Tensor]]:
    """One optimizer step's loss, metrics and gradients, as the loop forms them."""
    distiller.zero_grad()
    counts: dict[str, float] = {}
    for batch in micro_batches:
        for name, value in distiller.count(batch).items():
            counts[name] = counts.get(name, 0.0) + value
    total, metrics = 0.0, {}
    for batch in micro_batches:
        loss, shares = distiller(batch, counts)
        loss.backward()
        total += float(loss.detach())
        for name, value in shares.items():
            metrics[name] = metrics.get(name, 0.0) + value
    gradients = {n: p.grad.clone() for n, p in distiller.named_parameters() if p.grad is not None}
    return total, metrics, gradients


def dense(distiller: Distiller, batch: Batch) -> Tensor:
    """The same loss from whole-batch logits, in plain torch."""
    y = distiller.teacher.model(**batch.model_inputs()).logits.float()  # pyright: ignore
    z = distiller.student.model(**batch.model_inputs()).logits.float()
    total = torch.zeros(())
    for term in distiller.terms.values():
        allowed = torch.tensor([not term.domains or d in term.domains for d in batch.domain])
        mask = batch.mask & allowed[batch.segment.clamp(min=0)]
        value = term(batch, StudentOutput(logits=z), TeacherSignal(logits=y))
        weight = batch.weight[batch.segment.clamp(min=0)]
        total = total + term.weight * (value * weight)[mask].sum() / mask.sum()
    return total


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("chunk", [1, 5, 1000])
def test_equals_a_dense_loss_written_in_plain_torch(tied: bool, chunk: int) -> None:
    distiller, batch = make(tied, chunk), toys.batch()
    reference = dense(distiller, batch)
    parameters = dict(distiller.named_parameters())
    expected = dict(zip(parameters, torch.autograd.grad(reference, list(parameters.values())), strict=True))
    total, metrics, gradients = step(distiller, [batch])
    assert total == pytest.approx(reference.item(), rel=1e-5)
    assert metrics["loss/total"] == pytest.approx(metrics["loss/kd"] + 0.5 * metrics["loss/ce"], rel=1e-5)
    assert set(gradients) == set(expected)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("objective", [ForwardKL(), ReverseKL(), GeneralizedJSD(beta=0.3), CrossEntropy()])
def test_gradient_does_not_depend_on_how_a_step_is_split(objective: Objective) -> None:
    distiller, whole = make(x=objective, ce=CrossEntropy(domains=["b"])), toys.batch(rows=6)
    one = step(distiller, [whole])
    for cuts in ([0, 1, 6], [0, 2, 4, 6], [0, 1, 2, 3, 4, 5, 6]):
        parts = [toys.rows_of(whole, a, b) for a, b in pairwise(cuts)]
        total, metrics, gradients = step(distiller, parts)
        assert total == pytest.approx(one[0], rel=1e-5) and metrics == pytest.approx(one[1], rel=1e-5)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, one[2][name], rtol=1e-4, atol=1e-6)


def test_packed_rows_give_the_loss_of_separate_rows() -> None:
    whole = toys.batch(rows=2, length=10)
    lengths = whole.attention_mask.sum(1).tolist()

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(whole, name)[i, :n] for i, n in enumerate(lengths)])[None]

    packed = Batch(
        **{name: joined(name) for name in ("input_ids", "targets", "mask", "attention_mask", "segment")},
        position_ids=torch.cat([torch.arange(n) for n in lengths])[None],
        weight=whole.weight,
        row=whole.row,
        domain=whole.domain,
    )
    distiller = make()
    one, other = step(distiller, [whole]), step(distiller, [packed])
    assert other[0] == pytest.approx(one[0], rel=1e-5)
    for name, gradient in other[2].items():
        torch.testing.assert_close(gradient, one[2][name], rtol=1e-4, atol=1e-6)


def test_masked_targets_and_padding_do_not_matter() -> None:
    distiller, batch = make(), toys.batch()
    one = step(distiller, [batch])
    batch.targets = torch.where(batch.mask, batch.targets, 0)
    batch.input_ids = torch.where(batch.attention_mask, batch.input_ids, 7)
    assert step(distiller, [batch])[0] == pytest.approx(one[0], rel=1e-6)


def test_masked_targets_cost_no_head_flops() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    distiller, batch = make(), toys.batch(length=24)

    def flops(share: float) -> int:
        keep = torch.arange(batch.mask.numel()).reshape(batch.mask.shape) % 4 < 4 * share
        counts = None
        part = toys.rows_of(batch, 0, 4)
        part.mask = keep
        part.segment = torch.arange(4)[:, None].expand_as(keep)
        counts = distiller.count(part)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            hidden = distiller.student(part)
        body = counter.get_total_flops()
        del hidden
        with FlopCounterMode(display=False) as counter:
            distiller(part, counts)
        teacher_and_head = counter.get_total_flops() - body
        with FlopCounterMode(display=False) as counter:
            distiller.teacher.annotate(part, Need.DISTRIBUTION)
        return teacher_and_head - counter.get_total_flops()

    assert flops(0.25) == pytest.approx(flops(1.0) / 4, rel=1e-6)


def test_no_supervised_target_gives_zero_with_a_graph() -> None:
    distiller, batch = make(), toys.batch()
    batch.mask = torch.zeros_like(batch.mask)
    total, metrics, gradients = step(distiller, [batch])
    assert total == 0 and metrics["loss/kd"] == 0
    assert gradients and all(g.abs().max() == 0 for g in gradients.values())


def test_a_rank_without_a_terms_domain_adds_nothing_and_stays_finite() -> None:
    distiller = make(kd=ForwardKL(domains=["b"]))
    only_a = toys.batch(domains=("a",))
    total, _, gradients = step(distiller, [only_a])
    assert total == 0 and all(torch.isfinite(g).all() for g in gradients.values())


def test_example_weights_multiply_values_and_not_counts() -> None:
    distiller, batch = make(), toys.batch()
    batch.weight = torch.tensor([0.0, 1.0, 2.0, 0.5])
    assert step(distiller, [batch])[0] == pytest.approx(dense(distiller, batch).item(), rel=1e-5)


def test_a_student_equal_to_its_teacher_has_no_loss_and_no_gradient() -> None:
    model = toys.llama(1)
    import copy

    distiller = Distiller(toys.ToyStudent(model), toys.ToyTeacher(copy.deepcopy(model)), {"kd": ForwardKL()})
    total, _, gradients = step(distiller, [toys.batch()])
    assert abs(total) < 1e-6 and all(g.abs().max() < 1e-5 for g in gradients.values())


def test_vocabularies_padded_to_different_sizes_are_cut_to_the_real_ids() -> None:
    """Rows of padding, whatever is in them, change nothing (METHODS D13, D14)."""
    losses = []
    for padded in (33, 40, 64):
        student, teacher = toys.llama(1, vocab=33, tied=False), toys.llama(2, layers=3, width=24)
        wide = toys.llama(2, layers=3, width=24)
        wide.resize_token_embeddings(padded)
        wide.load_state_dict(
            {
                **wide.state_dict(),
                **{k: v for k, v in teacher.state_dict().items() if "embed" not in k and "lm_head" not in k},
            }
        )
        with torch.no_grad():
            wide.get_input_embeddings().weight[:33] = teacher.get_input_embeddings().weight
            wide.get_input_embeddings().weight[33:] = 1e4
        losses.append(
            step(Distiller(toys.ToyStudent(student), toys.ToyTeacher(wide), {"kd": ReverseKL()}), [toys.batch()])[0]
        )
    assert losses[1] == pytest.approx(losses[0], rel=1e-6) and losses[2] == pytest.approx(losses[0], rel=1e-6)


def test_teacher_gets_no_gradient_and_is_no_part_of_the_module() -> None:
    distiller = make()
    step(distiller, [toys.batch()])
    teacher = distiller.teacher.model  # pyright: ignore
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    owned = {id(p) for p in distiller.parameters()}
    assert not owned & {id(p) for p in teacher.parameters()}


class Learned(Objective):
    """An objective with a parameter of its own and no closed form."""

    needs = Need.DISTRIBUTION

    def __init__(self) -> None:
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor([0.5]))

    def forward(self, batch: Batch, student: StudentOutput, teacher: TeacherSignal) -> Tensor:
        log_p, log_q = teacher.log_p(), student.log_q()
        assert log_p is not None
        return (self.gain * log_q - log_p).square().mean(-1)


def test_an_objective_of_ones_own_needs_only_forward_and_its_parameters_learn() -> None:
    distiller, batch = make(chunk=3, mine=Learned(), ce=CrossEntropy()), toys.batch()
    reference = dense(distiller, batch)
    (expected,) = torch.autograd.grad(reference, list(distiller.terms["mine"].parameters()))
    total, _, gradients = step(distiller, [batch])
    assert total == pytest.approx(reference.item(), rel=1e-5)
    torch.testing.assert_close(gradients["gathered_head.mine/gain"], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 2])
def test_how_many_rows_of_a_chunk_are_formed_at_once_changes_nothing(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    distiller, batch = make(chunk=5, mine=Learned(), kd=ForwardKL(temperature=2.0), ce=CrossEntropy()), toys.batch()
    total, metrics, gradients = step(distiller, [batch])
    monkeypatch.setattr("kdcli.train.distiller.rows_at_once", lambda logits: rows)
    again = step(distiller, [batch])
    assert again[0] == pytest.approx(total, rel=1e-6) and again[1] == pytest.approx(metrics, rel=1e-6)
    for name, gradient in again[2].items():
        torch.testing.assert_close(gradient, gradients[name], rtol=1e-5, atol=1e-7)


def test_scores_are_the_dense_ones_and_zero_elsewhere() -> None:
    distiller, batch = make(chunk=4), toys.batch()
    scores = distiller(batch, mode="score")
    with torch.no_grad():
        y = distiller.teacher.model(**batch.model_inputs()).logits  # pyright: ignore
        z = distiller.student.model(**batch.model_inputs()).logits
    log_p, log_q = torch.log_softmax(y, -1), torch.log_softmax(z, -1)
    expected = {
        "nll": -log_q.gather(-1, batch.targets[..., None])[..., 0],
        "teacher_nll": -log_p.gather(-1, batch.targets[..., None])[..., 0],
        "kl": (log_p.exp() * (log_p - log_q)).sum(-1),
        "agree": (y.argmax(-1) == z.argmax(-1)).float(),
    }
    for name, values in expected.items():
        torch.testing.assert_close(getattr(scores, name), values * batch.mask, rtol=1e-4, atol=1e-5)


def test_scores_without_a_teacher_are_the_students_alone() -> None:
    class Nobody(Teacher):
        def annotate(self, batch: Batch, needs: Need) -> TeacherSignal:
            return TeacherSignal()

    distiller = Distiller(toys.ToyStudent(toys.llama(1)), Nobody(), {"ce": CrossEntropy()})
    scores = distiller(toys.batch(), mode="score")
    assert scores.teacher_nll is None and scores.kl is None and scores.nll.sum() > 0
    empty = toys.batch()
    empty.mask = torch.zeros_like(empty.mask)
    assert distiller(empty, mode="score").nll.sum() == 0


class SequenceNLL(Objective):
    """The negative log-likelihood of a sequence."""

    unit = Unit.SEQUENCE
    scope = Scope.LOGPROBS

    def forward(self, batch: Batch, student: StudentOutput, teacher: TeacherSignal) -> Tensor:
        assert student.logprobs is not None
        return -batch.sum_by_sequence(student.logprobs)


class Margin(Objective):
    """How much likelier a pair's worse answer is than its better one, against the student as it began."""

    needs = Need.REFERENCE
    unit = Unit.GROUP
    scope = Scope.LOGPROBS

    def forward(self, batch: Batch, student: StudentOutput, teacher: TeacherSignal) -> Tensor:
        assert student.logprobs is not None and teacher.reference_logprobs is not None
        change = batch.sum_by_sequence(student.logprobs - teacher.reference_logprobs)
        return change.new_zeros(int(batch.groups().max()) + 1).index_add(
            0, batch.groups(), torch.where(batch.rejected, change, -change)
        )


class HeadNorm(Objective):
    """The mean squared logit of a target, from the states and the head."""

    scope = Scope.STATES

    def forward(self, batch: Batch, student: StudentOutput, teacher: TeacherSignal) -> Tensor:
        assert student.hidden is not None and student.head is not None
        return student.head(student.hidden).square().mean(-1)


def pairs(seed: int = 0) -> Batch:
    batch = toys.batch(seed, rows=6)
    batch.group_index = torch.tensor([0, 0, 1, 1, 2, 2])
    batch.rejected = torch.tensor([False, True] * 3)
    batch.domain = ["a", "a", "b", "b", "a", "a"]
    batch.weight = torch.tensor([1.0, 1.0, 0.5, 0.5, 2.0, 2.0])
    return batch


def plain_logits(distiller: Distiller, batch: Batch) -> Tensor:
    return distiller.student.model(**batch.model_inputs()).logits.float()


def test_a_loss_per_sequence_equals_its_dense_form_in_value_and_gradient() -> None:
    distiller, batch = make(nll=SequenceNLL(weight=0.5), chunk=5), toys.batch()
    batch.weight = torch.tensor([1.0, 0.5, 2.0, 1.0])
    value, metrics, gradients = step(distiller, [batch])
    distiller.zero_grad()
    log_q = torch.log_softmax(plain_logits(distiller, batch), -1).gather(-1, batch.targets[..., None])[..., 0]
    dense = (batch.weight * -(log_q * batch.mask).sum(-1)).sum() / 4
    (0.5 * dense).backward()
    assert value == pytest.approx(float(0.5 * dense.detach()), rel=1e-5)
    assert metrics["loss/nll"] == pytest.approx(float(dense.detach()), rel=1e-5)
    for name, parameter in distiller.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-5)


def test_a_loss_of_states_equals_its_dense_form_in_value_and_gradient() -> None:
    distiller, batch = make(norm=HeadNorm(), ce=CrossEntropy(), chunk=5), toys.batch()
    value, _, gradients = step(distiller, [batch])
    distiller.zero_grad()
    z = plain_logits(distiller, batch)
    nll = -torch.log_softmax(z, -1).gather(-1, batch.targets[..., None])[..., 0]
    dense = (z.square().mean(-1) + nll)[batch.mask].mean()
    dense.backward()
    assert value == pytest.approx(float(dense.detach()), rel=1e-5)
    for name, parameter in distiller.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-5)


def test_groups_are_counted_and_weighted_and_the_reference_is_the_student_as_it_began() -> None:
    distiller, batch = make(margin=Margin(domains=["a"])), pairs()
    assert distiller.count(batch)["margin"] == 2
    value, _, gradients = step(distiller, [batch])
    assert value == pytest.approx(0, abs=1e-4)  # nothing has changed yet
    with torch.no_grad():
        for name, parameter in distiller.named_parameters():
            if name in gradients and name.startswith("student"):
                parameter -= 1e-3 * gradients[name]
    log_q = torch.log_softmax(plain_logits(distiller, batch), -1).gather(-1, batch.targets[..., None])[..., 0]
    original = make()
    log_r = torch.log_softmax(plain_logits(original, batch), -1).gather(-1, batch.targets[..., None])[..., 0]
    change = ((log_q - log_r) * batch.mask).sum(-1)
    expected = (1.0 * (change[1] - change[0]) + 2.0 * (change[5] - change[4])) / 2
    assert step(distiller, [batch])[0] == pytest.approx(float(expected), rel=1e-3)
    assert expected < 0


def test_a_worse_answer_has_no_targets_for_losses_per_token() -> None:
    batch = pairs()
    assert make(ce=CrossEntropy()).count(batch)["ce"] == batch.mask[::2].sum()
    better = toys.rows_of(batch, 0, 1)
    one, both = toys.rows_of(batch, 0, 2), make(ce=CrossEntropy())
    one.rejected = torch.tensor([False, True])
    assert step(both, [one])[0] == pytest.approx(step(both, [better])[0], rel=1e-5)


@pytest.mark.parametrize("reduction", ["token", "sequence", "batch"])
def test_reductions_are_what_they_say_however_the_step_is_cut(reduction: Reduction) -> None:
    distiller, batch = make(ce=CrossEntropy(reduction=reduction)), toys.batch()
    nll = -torch.log_softmax(plain_logits(distiller, batch), -1).gather(-1, batch.targets[..., None])[..., 0]
    sums, lengths = (nll * batch.mask).sum(-1), batch.mask.sum(-1)
    expected = {"token": sums.sum() / lengths.sum(), "sequence": (sums / lengths).mean(), "batch": sums.mean()}
    for cuts in ([0, 4], [0, 1, 4], [0, 2, 3, 4]):
        parts = [toys.rows_of(batch, a, b) for a, b in pairwise(cuts)]
        assert step(distiller, parts)[0] == pytest.approx(float(expected[reduction]), rel=1e-5)


@pytest.mark.parametrize("term", [SequenceNLL, HeadNorm])
def test_nothing_supervised_gives_zero_with_a_graph_to_every_parameter(term: type[Objective]) -> None:
    distiller, batch = make(x=term()), toys.batch()
    batch.mask = torch.zeros_like(batch.mask)
    value, _, gradients = step(distiller, [batch])
    assert value == 0
    assert len(gradients) == len(list(distiller.named_parameters()))
    assert all(gradient.abs().max() == 0 for gradient in gradients.values())


def test_no_tensor_of_tokens_times_vocabulary_is_made() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    distiller, batch = make(chunk=4), toys.batch(rows=4, length=24)
    targets = int(batch.mask.sum())
    sizes: list[int] = []

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, Tensor) and tensor.shape[-1:] == (toys.VOCAB,):
                    sizes.append(tensor.numel())
            return out

    counts = distiller.count(batch)
    with Largest():
        loss, _ = distiller(batch, counts)
        loss.backward()
    widest = 24  # the teacher's width: its head, transposed, is the largest tensor with a vocabulary axis
    assert sizes and max(sizes) <= widest * toys.VOCAB < targets * toys.VOCAB


def test_a_target_without_a_place_in_the_teachers_prompt_is_not_learned_from_it():
    student, teacher = toys.ToyStudent(toys.llama(0)), toys.ToyTeacher(toys.llama(1))
    batch = toys.batch()
    position = torch.arange(batch.mask.shape[1]).expand_as(batch.mask).clone()
    position[0, 5:] = -1
    view = TeacherView(input_ids=batch.input_ids, attention_mask=batch.attention_mask, position=position)
    batch = replace(batch, teacher=view)
    kd, ce = ForwardKL(), CrossEntropy()
    counts = Distiller(student, teacher, {"kd": kd, "ce": ce}).count(batch)
    assert counts["ce"] == float(batch.mask.sum()), "text is learned from all the same"
    assert counts["kd"] == float((batch.mask & (position >= 0)).sum()) < counts["ce"]


def test_an_id_that_only_the_student_knows_is_refused_by_name():
    student, teacher = toys.ToyStudent(toys.llama(0, vocab=toys.VOCAB + 2)), toys.ToyTeacher(toys.llama(1))
    teacher.shape = lambda: shape_of(teacher.model.config, toys.VOCAB)
    distiller = Distiller(student, teacher, {"kd": ForwardKL()})
    batch = toys.batch()
    distiller(batch, distiller.count(batch))
    batch.targets[batch.mask.nonzero()[0, 0], batch.mask.nonzero()[0, 1]] = toys.VOCAB
    with pytest.raises(ConfigError, match=f"the id {toys.VOCAB}, which only the student knows"):
        distiller(batch, distiller.count(batch))
