"""Objectives for different tokenizers: what each must not depend on, values by hand, and gradients."""

from __future__ import annotations

import inspect
import math
from dataclasses import fields, is_dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from kdcli.api import Objective, Scope, StudentOutput, TeacherSignal, TeacherView, Unit
from kdcli.errors import ConfigError
from kdcli.objective.alm import ALM
from kdcli.objective.cross_entropy import CrossEntropy
from kdcli.objective.dskd import DSKD
from kdcli.objective.dskd_cma import DSKDCMA
from kdcli.objective.forward_kl import ForwardKL
from kdcli.objective.generalized_jsd import GeneralizedJSD
from kdcli.objective.gold import GOLD
from kdcli.objective.mined import MinED
from kdcli.objective.multi_level_ot import MultiLevelOT
from kdcli.objective.uld import ULD
from kdcli.train.conformance import oracles_cross
from tests.objective.cross import (
    OTHER_V,
    SHAPES,
    DoubleHead,
    Models,
    V,
    at_targets,
    chosen,
    models,
    packed,
    prepared,
    row,
    summed,
)


def tokenizer(tokens: str) -> Any:
    words = tokens.split()
    return SimpleNamespace(get_vocab=lambda: {word: i for i, word in enumerate(words)}, eos_token_id=None)


# four tokens of both, at other ids, and "these" one edit from "thes"
TOKENIZERS = tokenizer("a b c d thes s0 s1"), tokenizer("t0 d c these b t1 a t2 t3")
WHOLE = {
    "alm": lambda: ALM(),
    "alm reverse": lambda: ALM(divergence="reverse_kl", temperature=1.0),
    "gold": lambda: GOLD(),
    "gold observed": lambda: GOLD(merge="observed", temperature=2.0, temperature_scale="t2"),
    "gold hybrid": lambda: GOLD(hybrid=True),
    "gold hybrid reverse": lambda: GOLD(hybrid=True, matched_weight=0.7, divergence="reverse_kl", merge="observed"),
    "mined": lambda: MinED(),
    "mined skip": lambda: MinED(unmatched="skip", near=False, temperature=2.0),
    "dskd": lambda: DSKD(),
    "dskd jsd": lambda: DSKD(divergence="generalized_jsd", temperature=2.0, temperature_scale="t2"),
    "dskd_cma": lambda: DSKDCMA(),
    "multi_level_ot": lambda: MultiLevelOT(top_k=4),
    "multi_level_ot transport": lambda: MultiLevelOT(top_k=50, sinkhorn_weight=1.0, log_weight=0.0),
}
every = pytest.mark.parametrize("name", WHOLE)
either = pytest.mark.parametrize("foreign", [True, False], ids=["foreign", "shared"])


def objective(name: str) -> Objective:
    return prepared(WHOLE[name](), TOKENIZERS)


def total(one: Objective, at: Models) -> float:
    return float(summed(one, at).detach())


def gradients(one: Objective, at: Models) -> dict[str, Tensor]:
    leaves = at.leaves() | dict(one.named_parameters())
    found = torch.autograd.grad(summed(one, at), list(leaves.values()), allow_unused=True)
    return {n: torch.zeros_like(t) if g is None else g for (n, t), g in zip(leaves.items(), found, strict=True)}


# ------------------------------------------------------------------------------------------ of all of them


@every
@either
def test_has_a_finite_number_per_unit(name: str, foreign: bool) -> None:
    one, at = objective(name), models(foreign=foreign)
    values = one(at.batch, at.student, at.teacher)
    assert values.shape == (at.batch.mask.shape if one.unit is Unit.TOKEN else (3,))
    assert bool(torch.isfinite(values).all())
    assert bool((values[chosen(one, at.batch)] != 0).all())
    assert one.cross_tokenizer


@every
@either
def test_gradients_are_those_of_finite_differences(name: str, foreign: bool) -> None:
    """Of every input of the student and of every learned parameter; what an objective detaches has no difference."""
    one, at = objective(name), models(foreign=foreign)
    found = gradients(one, at)
    step = 1e-6
    generator = torch.Generator().manual_seed(2)
    for leaf, tensor in (at.leaves() | dict(one.named_parameters())).items():
        direction = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        if getattr(one, "stops_gradient", False) and leaf not in ("into_teacher.weight", "into_teacher.bias"):
            continue  # the next test
        sums = []
        for sign in (1, -1):
            with torch.no_grad():
                tensor += sign * step * direction
            sums.append(total(one, at))
            with torch.no_grad():
                tensor -= sign * step * direction
        expected = (sums[0] - sums[1]) / (2 * step)
        assert float((found[leaf] * direction).sum()) == pytest.approx(expected, rel=1e-5, abs=1e-7), leaf


@every
@either
def test_what_is_not_supervised_may_hold_anything(name: str, foreign: bool) -> None:
    one, at = objective(name), models(foreign=foreign)
    expected, slopes = total(one, at), gradients(one, at)
    generator = torch.Generator().manual_seed(4)
    off = ~at.batch.mask
    with torch.no_grad():
        at.student.hidden[off] = 1e3  # pyright: ignore
        at.student.logprobs[off] = -1e3  # pyright: ignore
        if at.teacher.hidden is not None:
            at.teacher.hidden[off] = -1e3
        if at.teacher.logprobs is not None:
            at.teacher.logprobs[off] = -1e3
    for ids in (at.batch.targets, at.batch.input_ids):
        ids[off] = torch.randint(0, V, ids.shape, generator=generator)[off]
    view = at.batch.teacher
    if view is not None:
        assert view.mask is not None and view.targets is not None and view.span is not None
        assert view.teacher_span is not None and at.teacher.own_hidden is not None
        view.span[off] = 0
        view.teacher_span[~view.mask] = 1
        for ids in (view.targets, view.input_ids):
            ids[~view.mask] = torch.randint(0, OTHER_V, ids.shape, generator=generator)[~view.mask]
        at.teacher.own_hidden[~view.mask] = 1e3
        at.teacher.own_logprobs[~view.mask] = -1e3  # pyright: ignore
    assert total(one, at) == pytest.approx(expected, rel=1e-12)
    for leaf, slope in gradients(one, at).items():
        torch.testing.assert_close(slope, slopes[leaf], rtol=1e-9, atol=1e-12)


@every
@either
def test_packing_changes_nothing(name: str, foreign: bool) -> None:
    one, at = objective(name), models(foreign=foreign)
    together = packed(at)
    values = [one(m.batch, m.student, m.teacher)[chosen(one, m.batch)] for m in (at, together)]
    torch.testing.assert_close(values[1], values[0], rtol=1e-10, atol=1e-12)


@every
@either
def test_sequences_do_not_see_each_other(name: str, foreign: bool) -> None:
    one, at = objective(name), models(foreign=foreign)
    whole = one(at.batch, at.student, at.teacher)[chosen(one, at.batch)]
    alone = [one(m.batch, m.student, m.teacher)[chosen(one, m.batch)] for m in (row(at, i) for i in range(3))]
    torch.testing.assert_close(torch.cat(alone), whole, rtol=1e-10, atol=1e-12)


@every
@either
def test_nothing_to_learn_is_zero_with_a_graph(name: str, foreign: bool) -> None:
    one, at = objective(name), models(foreign=foreign)
    at.batch.mask = torch.zeros_like(at.batch.mask)
    assert not bool(chosen(one, at.batch).any())
    loss = summed(one, at)
    loss.backward()
    assert float(loss.detach()) == 0.0
    for tensor in at.leaves().values():
        assert tensor.grad is None or not bool(tensor.grad.any())


@every
def test_no_span_at_all_is_no_error(name: str) -> None:
    """Answers that the teacher's side has lost: only what the data say can be learned."""
    one, at = objective(name), models()
    view = at.batch.teacher
    assert view is not None and view.span is not None and view.teacher_span is not None
    at.batch.teacher = replace(
        view,
        span=torch.full_like(view.span, -1),
        teacher_span=torch.full_like(view.teacher_span, -1),
        position=torch.full_like(view.position, -1),
    )
    assert bool(chosen(one, at.batch).any()) == (name == "mined")
    assert bool(torch.isfinite(summed(one, at)))


@every
@either
def test_saturated_logits_stay_finite(name: str, foreign: bool) -> None:
    one, at = objective(name).float(), models(foreign=foreign, spread=300.0)
    head, other = at.student.head, at.teacher.head
    assert head is not None and other is not None
    at.student = replace(
        at.student,
        hidden=at.student.hidden.detach().float().requires_grad_(),  # pyright: ignore
        logprobs=at.student.logprobs.detach().float().requires_grad_(),  # pyright: ignore
        embedding=at.student.embedding.float(),  # pyright: ignore
        head=replace(head, weight=head.weight.detach().float(), bias=head.bias.detach().float()),  # pyright: ignore
    )
    at.teacher = replace(
        at.teacher,
        head=replace(other, weight=other.weight.float(), bias=other.bias.float()),  # pyright: ignore
        **{
            n: None if getattr(at.teacher, n) is None else getattr(at.teacher, n).float()
            for n in ("hidden", "own_hidden", "logprobs", "own_logprobs", "embedding")
        },
    )
    loss = summed(one, at)
    loss.backward()
    assert bool(torch.isfinite(loss))
    for tensor in (at.student.hidden, at.student.logprobs):
        assert tensor is not None
        assert tensor.grad is None or bool(torch.isfinite(tensor.grad).all())


@every
def test_the_students_ids_may_be_in_any_order(name: str) -> None:
    one, at = objective(name), models()
    expected = total(one, at)
    order = torch.randperm(V, generator=torch.Generator().manual_seed(6))
    head, words = at.student.head, list(TOKENIZERS[0].get_vocab())
    assert head is not None and head.bias is not None and at.student.embedding is not None
    moved = tokenizer(" ".join(words[i] for i in order))
    place = torch.argsort(order)
    at.batch.targets, at.batch.input_ids = place[at.batch.targets], place[at.batch.input_ids]
    at.student = replace(
        at.student,
        head=replace(head, weight=head.weight[order], bias=head.bias[order]),
        embedding=at.student.embedding[order],
    )
    again = prepared(WHOLE[name](), (moved, TOKENIZERS[1]))
    assert total(again, at) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("name", ["alm", "alm reverse", "gold", "gold observed", "gold hybrid", "mined", "mined skip"])
@pytest.mark.parametrize("foreign", [True, False], ids=["own view", "shared"])
def test_a_student_that_is_the_teacher_has_no_loss(name: str, foreign: bool) -> None:
    """With a view of its own whose tokens are the same, and with none."""
    at = twins(foreign)
    one = prepared(WHOLE[name](), (TOKENIZERS[0], TOKENIZERS[0]))
    assert one.zero_at_teacher
    assert total(one, at) == pytest.approx(0.0, abs=1e-12)
    for slope in gradients(one, at).values():
        assert float(slope.abs().max()) < 1e-9


def twins(foreign: bool) -> Models:
    """A teacher whose numbers are the student's, with a view of its own if `foreign`."""
    at = models(foreign=False)
    batch, hidden, logprobs, head = at.batch, at.student.hidden, at.student.logprobs, at.student.head
    assert hidden is not None and logprobs is not None and head is not None and head.bias is not None
    twin = TeacherSignal(
        hidden=hidden.detach(),
        head=DoubleHead(weight=head.weight.detach(), bias=head.bias.detach(), vocab_size=V, scale=head.scale),
        logprobs=logprobs.detach(),
        embedding=at.student.embedding,
    )
    if foreign:
        span = torch.where(batch.mask, batch.mask.flatten().cumsum(0).view_as(batch.mask) - 1, -1)
        places = torch.arange(batch.mask.shape[1]).expand_as(batch.mask)
        batch.teacher = TeacherView(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position=torch.where(batch.mask, places, -1),
            targets=batch.targets,
            mask=batch.mask,
            span=span,
            teacher_span=span,
        )
        twin = replace(twin, own_hidden=twin.hidden, own_logprobs=twin.logprobs)
    return Models(batch, at.student, twin)


@pytest.mark.parametrize("name", [name for name in WHOLE if name != "multi_level_ot transport"])
def test_a_view_that_cuts_alike_is_no_view(name: str) -> None:
    """Spans of one token each are a shared tokenizer."""
    totals = []
    for foreign in (True, False):
        at = twins(foreign)
        noise = torch.Generator().manual_seed(9)
        assert at.teacher.hidden is not None and at.teacher.logprobs is not None
        shift = torch.randn(at.teacher.hidden.shape, generator=noise, dtype=torch.float64)
        hidden, logprobs = at.teacher.hidden + shift, 2 * at.teacher.logprobs
        at.teacher = replace(at.teacher, hidden=hidden, logprobs=logprobs)
        if foreign:
            at.teacher = replace(at.teacher, own_hidden=hidden, own_logprobs=logprobs)
        one = WHOLE[name]()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            one.fit(SHAPES[0], SHAPES[0])
        one.match(TOKENIZERS[0], TOKENIZERS[0])
        totals.append(total(one.double(), at))
    assert totals[0] == pytest.approx(totals[1], rel=1e-9)
    assert totals[0] != 0.0


@every
def test_the_worse_answers_of_pairs_are_left_out(name: str) -> None:
    one, at = objective(name), models()
    at.batch.rejected = torch.tensor([False, True, False])
    units = chosen(one, at.batch)
    of = at.batch.segment if one.unit is Unit.TOKEN else torch.arange(3)
    assert bool(units[of == 0].any()) and bool(units[of == 2].any()) and not bool(units[of == 1].any())


@pytest.mark.parametrize("name", [name for name in WHOLE if name.split()[0] not in ("alm",)])
def test_a_teacher_of_top_k_alone_is_refused(name: str) -> None:
    at = models()
    at.teacher.head = None
    with pytest.raises(ConfigError, match="set teacher=hf"):
        objective(name)(at.batch, at.student, at.teacher)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: ULD(temperature=0.0), "temperature is 0"),
        (lambda: ALM(temperature=-1.0), "temperature is -1"),
        (lambda: GOLD(beta=1.0), "beta is 1"),
        (lambda: GOLD(matched_weight=1.5), "matched_weight is 1.5"),
        (lambda: MultiLevelOT(top_k=0), "top_k is 0"),
        (lambda: MultiLevelOT(sinkhorn_epsilon=0.0), "sinkhorn_epsilon is 0"),
        (lambda: DSKD().fit(SHAPES[0], None), "set teacher=hf"),
        (lambda: DSKDCMA().fit(SHAPES[0], None), "set teacher=hf"),
        (lambda: MinED().match(tokenizer("a b"), tokenizer("c d")), "no token of the teacher"),
    ],
)
def test_bad_settings_are_refused(make: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make()


# ------------------------------------------------------------------------------------------ uld


def chunk(p: list[float], q: list[float]) -> tuple[StudentOutput, TeacherSignal]:
    """One target with these probabilities, as logits [1, 1, V]."""
    y, z = (torch.tensor(values, dtype=torch.float64).log().view(1, 1, -1) for values in (p, q))
    return StudentOutput(logits=z), TeacherSignal(logits=y)


def test_uld_by_hand() -> None:
    """.9 .1 against .5 .3 .2: .4 + .2 + .2, whichever has more ids and in whatever order they are."""
    batch = row(models(), 0).batch
    assert float(ULD()(batch, *chunk([0.3, 0.5, 0.2], [0.1, 0.9]))) == pytest.approx(0.8)
    assert float(ULD()(batch, *chunk([0.9, 0.1], [0.2, 0.5, 0.3]))) == pytest.approx(0.8)


@pytest.mark.parametrize("sizes", [(9, 9), (9, 5), (5, 9)])
@pytest.mark.parametrize("settings", [{}, {"temperature": 2.0, "temperature_scale": "t2"}])
def test_uld_is_zero_at_the_teacher_up_to_order_and_never_negative(sizes: Any, settings: Any) -> None:
    one, batch = ULD(**settings), row(models(), 0).batch
    y, z = (torch.randn(1, 20, size, dtype=torch.float64) for size in sizes)
    values = one(batch, StudentOutput(logits=z), TeacherSignal(logits=y))
    assert bool((values > 0).all()) and bool((values <= 2 * one.scale).all())
    leaf = z.flip(-1).clone().requires_grad_()
    same = one(batch, StudentOutput(logits=leaf), TeacherSignal(logits=z))
    assert float(same.detach().abs().max()) < 1e-12


def test_uld_has_no_gradient_where_ranks_are_equally_likely() -> None:
    z = torch.randn(1, 3, 8, dtype=torch.float64)
    leaf = z.clone().requires_grad_()
    ULD()(row(models(), 0).batch, StudentOutput(logits=leaf), TeacherSignal(logits=z)).sum().backward()
    assert leaf.grad is not None and not bool(leaf.grad.any())


@pytest.mark.parametrize("sizes", [(9, 9), (9, 5), (5, 9)])
@pytest.mark.parametrize("settings", [{}, {"temperature": 2.0, "temperature_scale": "t2"}])
def test_ulds_closed_form_is_autograd(sizes: Any, settings: Any) -> None:
    one, batch = ULD(**settings), row(models(), 0).batch
    y, z = (torch.randn(1, 6, size, dtype=torch.float64) for size in sizes)
    leaf = z.clone().requires_grad_()
    values = one(batch, StudentOutput(logits=leaf), TeacherSignal(logits=y))
    (expected,) = torch.autograd.grad(values.sum(), leaf)
    closed = one.closed_form(batch, StudentOutput(logits=z), TeacherSignal(logits=y))
    torch.testing.assert_close(closed, (values.detach(), expected))
    step = 1e-6 * torch.randn_like(z)
    up, down = (one(batch, StudentOutput(logits=z + s), TeacherSignal(logits=y)).sum() for s in (step, -step))
    assert float((expected * step).sum()) == pytest.approx(float(up - down) / 2, rel=1e-5)


def test_uld_compares_what_begins_at_the_same_byte() -> None:
    at = models()
    assert at.batch.teacher is not None
    assert torch.equal(ULD().units(at.batch), at.batch.teacher.position >= 0)
    assert bool(ULD().units(models(foreign=False).batch).all())


# ------------------------------------------------------------------------------------------ gold


def single(spans: list[tuple[int, int]]) -> Models:
    """One row with these spans."""
    return models(rows=[(spans, (0, 0))])


def probabilities(hidden: Tensor, head: Any) -> Tensor:
    return torch.softmax(head(hidden), -1)


def test_golds_merged_probability_is_the_chain_rules() -> None:
    """Two tokens of the student beside one of the teacher: Q(v) = q(y_1) q(v | y_1), P(v) = p(v)."""
    at = single([(2, 1)])
    q = probabilities(at.student.hidden[0, 1:3], at.student.head)  # pyright: ignore
    p = probabilities(at.teacher.own_hidden[0, 2], at.teacher.head)  # pyright: ignore
    first, second = at.batch.targets[0, 1:3]
    for merge, merged in (("bayesian", q[0, first] * q[1]), ("observed", q[0] * q[1, second])):
        expected = sum(abs(a - b) for a, b in zip(ranked(merged, OTHER_V), ranked(p, OTHER_V), strict=True))
        assert total(GOLD(merge=merge), at) == pytest.approx(expected)  # pyright: ignore


def ranked(values: Tensor, size: int) -> list[float]:
    return sorted([*values.tolist(), *[0.0] * (size - len(values))], reverse=True)


def test_gold_of_spans_of_one_token_is_uld() -> None:
    at = single([(1, 1), (1, 1)])
    z, y = at.student.head(at.student.hidden), at.teacher.head(at.teacher.hidden)  # pyright: ignore
    expected = ULD()(at.batch, StudentOutput(logits=z), TeacherSignal(logits=y))[chosen(ULD(), at.batch)].sum()
    assert total(GOLD(), at) == pytest.approx(float(expected.detach()))


def test_hybrid_gold_of_equal_vocabularies_is_the_divergence() -> None:
    at = models(foreign=False)
    z, y = at.student.head(at.student.hidden), at.teacher.head(at.teacher.hidden)  # pyright: ignore
    jsd = GeneralizedJSD(beta=0.3)(at.batch, StudentOutput(logits=z), TeacherSignal(logits=y))[at.batch.mask].sum()
    assert total(GOLD(hybrid=True, beta=0.3), at) == pytest.approx(float(jsd.detach()))


@pytest.mark.parametrize("which", ["forward_kl", "reverse_kl", "generalized_jsd", "total_variation"])
@pytest.mark.parametrize("merge", ["bayesian", "observed"])
def test_hybrid_golds_comparison_of_matched_ids_is_no_less_than_zero(which: Any, merge: Any) -> None:
    """TRL's falls below 0, because the matched ids' probabilities do not sum to one."""
    one = prepared(GOLD(hybrid=True, matched_weight=1.0, divergence=which, merge=merge), TOKENIZERS)
    for seed in range(20):
        at = models(seed=seed)
        assert bool((one(at.batch, at.student, at.teacher)[chosen(one, at.batch)] >= 0).all())


def test_hybrid_gold_by_hand() -> None:
    """One token each: .6 .1 of matched ids and a rest of .3, against .2 .3 and .5; the unmatched sorted apart."""
    p, q = torch.tensor([0.2, 0.3, 0.4, 0.1]), torch.tensor([0.6, 0.1, 0.25, 0.05])
    one = GOLD(hybrid=True, divergence="forward_kl", matched_weight=0.25)
    one.matched = torch.tensor([[0, 0], [1, 1]])
    none = torch.zeros(1)
    value = one._hybrid(p.log()[None], q.log()[None], none, none, one.matched)
    direct = 0.2 * math.log(0.2 / 0.6) + 0.3 * math.log(0.3 / 0.1) + 0.5 * math.log(0.5 / 0.3)
    assert float(value) == pytest.approx(0.25 * direct + 0.75 * (0.15 + 0.05), rel=1e-6)


def test_gold_asks_for_the_tokenizers_where_ids_must_match() -> None:
    at = models()
    with pytest.raises(AssertionError, match=r"match\(\) comes before training"):
        GOLD(hybrid=True)(at.batch, at.student, at.teacher)


# ------------------------------------------------------------------------------------------ alm


def test_alm_by_hand() -> None:
    """Two targets of the student of .5 each beside one of the teacher of .36; at T = 2 that is .5 against .6."""
    at = single([(2, 1)])
    at.student.logprobs = torch.zeros_like(at.student.logprobs).masked_fill(at.batch.mask, math.log(0.5))  # pyright: ignore
    at.teacher.own_logprobs = torch.full_like(at.teacher.own_logprobs, math.log(0.36))  # pyright: ignore
    value = total(ALM(temperature=2.0), at)
    assert value == pytest.approx(0.6 * math.log(0.6 / 0.5) + 0.4 * math.log(0.4 / 0.5))
    assert total(ALM(temperature=2.0, divergence="total_variation"), at) == pytest.approx(0.1)


def test_alm_stays_finite_where_a_span_is_certain() -> None:
    at = single([(2, 1)])
    for certain, other in ((0.0, -1.0), (-1.0, 0.0), (0.0, 0.0), (-1e-8, -1e-7), (-500.0, 0.0)):
        leaf = torch.full(at.batch.mask.shape, certain).requires_grad_()
        at.student.logprobs = leaf
        at.teacher.own_logprobs = torch.full_like(at.teacher.own_logprobs, other, dtype=torch.float32)  # pyright: ignore
        loss = summed(ALM(), at)
        loss.backward()
        assert bool(torch.isfinite(loss)) and leaf.grad is not None and bool(torch.isfinite(leaf.grad).all())


# ------------------------------------------------------------------------------------------ mined


def test_mined_adds_up_what_passes_on_to_one_id() -> None:
    """Teacher's ids 0, 1 -> 2, id 2 -> 0, id 3 nowhere: .2 + .1 and .3 of .6."""
    at = single([(1, 1)])
    student, teacher = tokenizer("ab cd ▁ef"), tokenizer("▁ef <0xEF> ab zz")
    one = MinED()
    one.match(student, teacher)
    assert one.nearest is not None and one.nearest.tolist() == [2, -1, 0, -1]
    one.nearest = torch.tensor([2, 2, 0, -1])
    p, q = torch.tensor([0.2, 0.1, 0.3, 0.4]), torch.tensor([0.5, 0.2, 0.3])
    at.teacher.head = DoubleHead(weight=torch.eye(4).double(), vocab_size=4)
    at.student.head = DoubleHead(weight=torch.eye(3).double(), vocab_size=3)
    at.teacher.hidden = p.log().double().expand(1, at.batch.mask.shape[1], 4)
    at.student.hidden = q.log().double().expand(1, at.batch.mask.shape[1], 3)
    expected = 0.5 * math.log(0.5 / 0.5) + 0.5 * math.log(0.5 / 0.3)
    assert total(one, at) == pytest.approx(expected, rel=1e-6)


def test_mined_learns_the_datas_token_elsewhere() -> None:
    at = models()
    one = objective("mined")
    exact = MinED(unmatched="skip").units(at.batch)
    values = one(at.batch, at.student, at.teacher)
    z = at.student.head(at.student.hidden)  # pyright: ignore
    surprise = CrossEntropy()(at.batch, StudentOutput(logits=z), TeacherSignal())
    rest = at.batch.mask & ~exact
    assert int(rest.sum()) == 6 and int(exact.sum()) == 5
    torch.testing.assert_close(values[rest], surprise[rest])


def test_mined_of_a_shared_tokenizer_is_forward_kl() -> None:
    at = models(foreign=False)
    z, y = at.student.head(at.student.hidden), at.teacher.head(at.teacher.hidden)  # pyright: ignore
    kl = ForwardKL()(at.batch, StudentOutput(logits=z), TeacherSignal(logits=y))[at.batch.mask].sum()
    assert total(MinED(), at) == pytest.approx(float(kl.detach()))


def test_mined_asks_for_the_tokenizers() -> None:
    at = models()
    with pytest.raises(AssertionError, match=r"match\(\) comes before training"):
        MinED()(at.batch, at.student, at.teacher)


# ------------------------------------------------------------------------------------------ dskd


def test_dskd_of_a_teacher_that_is_the_student_is_its_cross_entropy() -> None:
    """Through maps that change nothing both divergences vanish, and CE is the model's own."""
    at = twins(False)
    one = DSKD()
    one.fit(SHAPES[0], SHAPES[0])
    for linear in (one.into_student, one.into_teacher):
        torch.nn.init.eye_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
    z = at.student.head(at.student.hidden)  # pyright: ignore
    surprise = CrossEntropy()(at.batch, StudentOutput(logits=z), TeacherSignal())[at.batch.mask].sum()
    assert total(one.double(), at) == pytest.approx(float(surprise.detach()))


@pytest.mark.parametrize("kind", [DSKD, DSKDCMA])
def test_dskds_maps_learn_each_from_its_own_part(kind: Any) -> None:
    """The student learns from D and from KL, not from CE; P_t2s from CE alone; the head not through CE."""
    at = models()
    one = prepared(kind())
    full = gradients(one, at)
    assert all(bool(full[name].any()) for name in ("into_student.weight", "into_teacher.weight", "hidden"))
    at.student = replace(at.student, hidden=at.student.hidden.detach().requires_grad_())  # pyright: ignore

    def surprise_only(head: Any, hidden: Tensor, mapped: Tensor, targets: Tensor, *, right: bool) -> Tensor:
        fixed = replace(head, weight=head.weight.detach(), bias=head.bias.detach())
        return -torch.log_softmax(fixed(mapped), -1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)

    one.student_side = surprise_only  # type: ignore[method-assign]
    part = gradients(one, at)
    torch.testing.assert_close(part["into_student.weight"], full["into_student.weight"])
    torch.testing.assert_close(part["into_teacher.weight"], full["into_teacher.weight"])
    assert not bool(part["weight"].any())


@pytest.mark.parametrize("kind", [DSKD, DSKDCMA])
@either
def test_dskds_gradients_with_what_is_detached_held_fixed(kind: Any, foreign: bool) -> None:
    """Finite differences of the loss in which the guide of D and the frozen head are numbers."""
    at = models(foreign=foreign)
    one = prepared(kind(divergence="reverse_kl", temperature=1.5))
    found = gradients(one, at)
    recorded: list[Tensor] = []

    def held(head: Any, hidden: Tensor, mapped: Tensor, targets: Tensor, *, right: bool) -> Tensor:
        if not recorded:
            recorded.extend([head.weight.detach().clone(), head.bias.detach().clone(), mapped.detach().clone()])
        weight, bias, guide = recorded
        frozen = replace(head, weight=weight, bias=bias)
        surprise = -torch.log_softmax(frozen(mapped), -1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        p = torch.log_softmax(frozen(guide) / 1.5, -1)
        q = torch.log_softmax(head(hidden) / 1.5, -1)
        distance = (q.exp() * (q - p)).sum(-1)
        return surprise + (torch.where(frozen(guide).argmax(-1) == targets, distance, 0.0) if right else distance)

    expected_total = total(one, at)
    one.student_side = held  # type: ignore[method-assign]
    assert total(one, at) == pytest.approx(expected_total, rel=1e-12)
    generator = torch.Generator().manual_seed(5)
    for leaf, tensor in (at.leaves() | dict(one.named_parameters())).items():
        direction = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        sums = []
        for sign in (1e-6, -1e-6):
            with torch.no_grad():
                tensor += sign * direction
            sums.append(total(one, at))
            with torch.no_grad():
                tensor -= sign * direction
        expected = (sums[0] - sums[1]) / 2e-6
        assert float((found[leaf] * direction).sum()) == pytest.approx(expected, rel=1e-5, abs=1e-6), leaf


def test_dskd_has_a_number_where_both_cut_alike() -> None:
    at = models()
    assert at.batch.teacher is not None
    assert torch.equal(prepared(DSKD()).units(at.batch) & at.batch.mask, at.batch.teacher.exact())


def test_dskd_cma_of_single_targets_needs_no_attention() -> None:
    """With one target on each side the weights are 1, so the mapped states are those of the only target."""
    at = models(rows=[([(1, 1)], (0, 0))])
    one = prepared(DSKDCMA())
    h, state = at.student.hidden[0, 1], at.teacher.own_hidden[0, 2]  # pyright: ignore
    view, table = at.batch.teacher, at.teacher.embedding
    assert view is not None and view.targets is not None and table is not None
    followed = table[view.targets[0, 2]]
    mapped = one.into_student(state / state.std() + followed / followed.std())
    logits, own = at.student.head(mapped), at.student.head(h)  # pyright: ignore
    target = at.batch.targets[0, 1]
    expected = -torch.log_softmax(logits, -1)[target]
    log_p, log_q = (torch.log_softmax(x, -1) for x in (logits, own))
    if int(logits.argmax()) == int(target):
        expected = expected + (log_p.exp() * (log_p - log_q)).sum()
    log_p, log_q = (torch.log_softmax(at.teacher.head(x), -1) for x in (state, one.into_teacher(h)))  # pyright: ignore
    expected = expected + (log_p.exp() * (log_p - log_q)).sum()
    assert total(one, at) == pytest.approx(float(expected.detach()))


def test_dskd_cma_does_not_depend_on_the_teachers_scale() -> None:
    """Hidden states and embeddings are divided by their standard deviations before they are mapped."""
    at, one = models(), prepared(DSKDCMA())
    head = at.teacher.head
    assert head is not None and head.bias is not None
    expected = total(one, at)
    at.teacher = replace(
        at.teacher,
        own_hidden=3 * at.teacher.own_hidden,  # pyright: ignore
        hidden=3 * at.teacher.hidden,  # pyright: ignore
        embedding=5 * at.teacher.embedding,  # pyright: ignore
        head=replace(head, weight=head.weight / 3),
    )
    with torch.no_grad():
        one.into_teacher.weight *= 3
        one.into_teacher.bias *= 3
    assert total(one, at) == pytest.approx(expected, rel=1e-9)


# ------------------------------------------------------------------------------------------ multi-level OT


def test_multi_level_ot_by_hand() -> None:
    """One target, logits of variance 1: sorted probabilities, and their logarithms."""
    at = single([(1, 1)])
    z, y = (torch.tensor(values, dtype=torch.float64) for values in ([1.0, -1.0, 0.0], [-1.0, 1.0, 0.0]))
    at.student.head, at.teacher.head = (DoubleHead(weight=torch.eye(3).double(), vocab_size=3) for _ in range(2))
    at.student.hidden = (7 * z).expand(1, at.batch.mask.shape[1], 3)
    at.teacher.hidden = (2 * y + 4).expand(1, at.batch.mask.shape[1], 3)
    one = MultiLevelOT(sinkhorn_weight=0.0)
    p = torch.softmax(torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64), -1)
    assert total(one, at) == pytest.approx(float(-0.1 * (p * p.log()).sum()), rel=1e-6)
    one.top_k = 2
    assert total(one, at) == pytest.approx(float(-0.1 * (p * p.log())[:2].sum()), rel=1e-6)


def test_multi_level_ot_ranks_by_the_whole_sequence() -> None:
    """Two targets whose order of tokens differs: a rank is one token throughout, so sorting each would give 0."""
    at = single([(1, 1), (1, 1)])
    eye = DoubleHead(weight=torch.eye(3).double(), vocab_size=3)
    at.student.head, at.teacher.head = eye, eye
    likely = torch.tensor([[2.0, 0.0, -2.0], [2.0, 0.5, -2.0]], dtype=torch.float64)
    other = torch.tensor([[2.0, 0.0, -2.0], [0.5, 2.0, -2.0]], dtype=torch.float64)
    at.student.hidden, at.teacher.hidden = torch.zeros(2, 1, at.batch.mask.shape[1], 3, dtype=torch.float64).unbind()
    at.student.hidden[at.batch.mask], at.teacher.hidden[at.batch.mask] = likely, other
    one = MultiLevelOT(sinkhorn_weight=0.0, log_weight=0.0)
    sorted_apart = [torch.softmax(x / x.std(), -1).sort().values for x in (likely[1], other[1])]
    torch.testing.assert_close(*sorted_apart)
    q, p = (torch.softmax(x / x.std(-1, keepdim=True), -1) for x in (likely, other))
    assert total(one, at) == pytest.approx(float((q - p).abs().sum() / 2), rel=1e-6)
    assert total(one, at) > 0.1


def test_multi_level_ot_does_not_depend_on_scale_and_offset_of_logits() -> None:
    at, one = models(), MultiLevelOT(sinkhorn_weight=1.0)
    expected = total(one, at)
    head, other = at.student.head, at.teacher.head
    assert head is not None and other is not None and head.bias is not None and other.bias is not None
    at.student = replace(at.student, head=replace(head, scale=3 * head.scale))
    at.teacher = replace(at.teacher, head=replace(other, bias=other.bias + 5.0))
    assert total(one, at) == pytest.approx(expected, rel=1e-6)


def test_multi_level_ot_has_a_gradient_where_all_logits_are_equal() -> None:
    at = models()
    with torch.no_grad():
        at.student.head.weight.zero_()  # pyright: ignore
        at.student.head.bias.zero_()  # pyright: ignore
    assert all(bool(torch.isfinite(slope).all()) for slope in gradients(MultiLevelOT(), at).values())


def test_every_whole_objective_is_of_a_scope_that_sees_the_view() -> None:
    assert {one().scope for one in WHOLE.values()} == {Scope.LOGPROBS, Scope.STATES}
    assert at_targets(torch.ones(1, 2, 3), torch.tensor([[1, -1]])).sum() == 3


# ------------------------------------------------------------------------------------------ the second formula


def namespace(record: Any) -> Any:
    """A record of tensors as one of arrays."""
    if isinstance(record, Tensor):
        return record.detach().numpy()
    if is_dataclass(record):
        return SimpleNamespace(**{f.name: namespace(getattr(record, f.name)) for f in fields(record)})
    return record


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("alm", {"divergence": "generalized_jsd", "temperature": 3.0}),
        ("gold", {"merge": "observed", "hybrid": True, "matched_weight": 0.2, "divergence": "reverse_kl", "beta": 0.3}),
        ("gold", {"hybrid": True, "divergence": "total_variation", "temperature": 2.0, "temperature_scale": "t2"}),
        ("mined", {"near": False, "temperature": 2.0, "temperature_scale": "t2"}),
        ("mined", {"unmatched": "skip"}),
        ("dskd", {"divergence": "reverse_kl", "temperature": 2.0, "temperature_scale": "t2"}),
        ("dskd_cma", {"divergence": "total_variation", "temperature": 0.5, "temperature_scale": "t2"}),
        ("multi_level_ot", {"top_k": 3, "sinkhorn_weight": 0.5, "sinkhorn_iterations": 3, "sinkhorn_epsilon": 0.5}),
    ],
)
@either
def test_equals_the_formula_in_plain_loops(name: str, settings: dict[str, Any], foreign: bool) -> None:
    """Above all what no property shows: which part a temperature, its square or a weight belongs to."""
    kind = type(WHOLE[name]())
    for seed in range(3):
        at, one = models(seed=seed, foreign=foreign), prepared(kind(**settings), TOKENIZERS)
        oracle = getattr(oracles_cross, name)
        read = {n: getattr(one, n) for n in inspect.signature(oracle).parameters if hasattr(one, n)}
        if "parameters" in inspect.signature(oracle).parameters:
            read["parameters"] = {n: p.detach().numpy() for n, p in one.named_parameters()}
        if "tokenizers" in inspect.signature(oracle).parameters:
            read["tokenizers"] = TOKENIZERS
        expected = torch.as_tensor(oracle(*map(namespace, (at.batch, at.student, at.teacher)), **read))
        units = chosen(one, at.batch)
        torch.testing.assert_close(one(at.batch, at.student, at.teacher)[units].detach(), expected[units])
