"""Losses of whole answers: against their oracles, against finite differences, and by hand."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import permutations, product
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kdcli.api import Batch, ModelShape, Need, Objective, Scope, StudentOutput, TeacherSignal, TopK, Unit
from kdcli.config import cross
from kdcli.errors import ConfigError
from kdcli.objective._embedding import pooled, read_answer, read_prompt, read_text
from kdcli.objective.contrastive import Contrastive
from kdcli.objective.distillm2 import DistiLLM2
from kdcli.objective.dpkd import DPKD
from kdcli.objective.dpo import DPO
from kdcli.objective.ipo import IPO
from kdcli.objective.kto import KTO
from kdcli.objective.listwise import Listwise
from kdcli.objective.orpo import ORPO
from kdcli.objective.policy_gradient import PolicyGradient
from kdcli.objective.pro import PRO
from kdcli.objective.reward_model import RewardModel
from kdcli.objective.rrhf import RRHF
from kdcli.objective.simpo import SimPO
from kdcli.objective.skew_kl import SkewKL
from kdcli.objective.skew_reverse_kl import SkewReverseKL
from kdcli.objective.slic import SLiC
from kdcli.ops.logprob import discounted_sums, log1mexp, log_odds
from kdcli.teacher.none import NoTeacher
from kdcli.train.conformance import oracles_sequences as oracles
from kdcli.train.distiller import Distiller
from tests import toys

D, V = 3, 11


@dataclass
class Answer:
    """One sequence of a batch: a prompt, supervised targets after it, and what the data say of it."""

    targets: int
    prompt: int = 2
    group: int = 0
    rejected: bool = False
    score: float | None = None


# A preference pair (whose scores contradict it, and never count), four scored answers with a tie and one without a
# score, a pair whose better answer was cut off, an answer alone, a scored pair with equal scores, and two groups more.
MIXED = [
    Answer(3, group=0, score=1.0),
    Answer(5, group=0, rejected=True, score=2.0),
    Answer(4, group=1, score=0.5),
    Answer(2, group=1, score=2.0, prompt=3),
    Answer(6, group=1, score=0.5, prompt=1),
    Answer(3, group=1, score=-1.5),
    Answer(3, group=1),
    Answer(0, group=2),
    Answer(4, group=2, rejected=True),
    Answer(1, group=3, score=1.0),
    Answer(2, group=4, score=3.0),
    Answer(3, group=4, score=3.0),
    Answer(3, group=5, score=2.0, prompt=4),
    Answer(2, group=5, score=2.0),
    Answer(4, group=5, score=-0.25),
    Answer(5, group=6),
    Answer(2, group=6, rejected=True),
]
# The targets of such a row: after the prompt's last token, and none after the row's last.


def batch_of(answers: Sequence[Answer], *, rows: Sequence[Sequence[int]] | None = None, pad: int = 2) -> Batch:
    """Each answer on a row of its own, or as `rows` packs them; every target is also an input, one position later."""
    rows = rows or [[i] for i in range(len(answers))]
    length = max(sum(answers[i].prompt + answers[i].targets for i in row) for row in rows) + pad
    ids = torch.randint(0, V, (len(rows), length), generator=torch.Generator().manual_seed(3))
    targets, shape = ids.roll(-1, 1), (len(rows), length)
    mask, attention = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
    segment = torch.full(shape, -1)
    for b, row in enumerate(rows):
        left = 0
        for i in row:
            begin, right = left + answers[i].prompt - 1, left + answers[i].prompt + answers[i].targets
            mask[b, begin : right - 1] = True
            attention[b, left:right] = True
            segment[b, left:right] = i
            left = right
    return Batch(
        input_ids=ids,
        targets=targets,
        mask=mask,
        attention_mask=attention,
        segment=segment,
        weight=torch.ones(len(answers)),
        position_ids=None,
        row=[f"row{i}" for i in range(len(answers))],
        domain=["default"] * len(answers),
        group=[str(a.group) for a in answers],
        score=[a.score for a in answers],
        rejected=torch.tensor([a.rejected for a in answers]) if any(a.rejected for a in answers) else None,
        group_index=torch.tensor([a.group for a in answers]),
    )


@dataclass
class Case:
    """What an objective sees; tensors in float64."""

    batch: Batch
    logprobs: Tensor
    hidden: Tensor
    teacher: TeacherSignal

    def student(self) -> StudentOutput:
        return StudentOutput(logprobs=self.logprobs, hidden=self.hidden)

    def to(self, dtype: torch.dtype) -> Case:
        values = {
            f.name: v.to(dtype) for f in fields(self.teacher) if isinstance(v := getattr(self.teacher, f.name), Tensor)
        }
        old = None if self.batch.old_logprobs is None else self.batch.old_logprobs.to(dtype)
        batch = replace(self.batch, old_logprobs=old)
        return Case(batch, self.logprobs.to(dtype), self.hidden.to(dtype), replace(self.teacher, **values))


def case(answers: Sequence[Answer] = MIXED, *, seed: int = 0, old: bool = True, **layout: Any) -> Case:
    """Random log-probabilities and states: the same ones for an answer, however it is laid out."""
    batch = batch_of(answers, **layout)

    def spread(kind: int, shape: tuple[int, ...], scale: float) -> Tensor:
        values = torch.zeros(*batch.mask.shape, *shape, dtype=torch.float64)
        for i in range(len(answers)):
            generator = torch.Generator().manual_seed(1000 * seed + 10 * i + kind)
            where = batch.segment == i
            drawn = torch.randn(int(where.sum()), *shape, generator=generator, dtype=torch.float64)
            values[where] = scale * drawn
        return values

    def logprobs(kind: int) -> Tensor:
        values = -spread(kind, (), 1.5).abs() - 0.05 * batch.mask
        return values.masked_fill(~batch.mask, 0.0)

    reward = torch.linspace(-1.0, 1.5, len(answers), dtype=torch.float64).cos()
    teacher = TeacherSignal(logprobs=logprobs(2), reference_logprobs=logprobs(3), reward=reward)
    if old:
        batch = replace(batch, old_logprobs=logprobs(1) + 0.3 * spread(4, (), 1.0) * batch.mask)
    return Case(batch, logprobs(1), spread(5, (D,), 1.0), teacher)


REFERENCED: list[dict[str, Any]] = [
    {},
    {"beta": 0.7, "reference": "teacher"},
    {"reference": "none", "length_normalize": True},
    {"length_normalize": True},
    {"answers": "scores"},
]
SETTINGS: dict[type[Objective], list[dict[str, Any]]] = {
    DPO: [*REFERENCED, {"label_smoothing": 0.2, "beta": 1.3}],
    IPO: [*REFERENCED],
    KTO: [
        *REFERENCED,
        {"desirable_weight": 2.0, "undesirable_weight": 0.5, "threshold": 0.6, "beta": 0.5, "baseline": "group"},
        {"answers": "pairs", "baseline": "group", "beta": 2.0},
    ],
    ORPO: [{}, {"alpha": 2.0, "answers": "scores"}],
    SimPO: [{"answers": "scores"}, {"beta": 0.5, "margin": 1.5}],
    SLiC: [
        {},
        {"margin": 0.0, "sft_weight": 0.0},
        {"length_normalize": True, "sft_weight": 1.0, "margin": 0.3, "answers": "scores"},
    ],
    RRHF: [{}, {"rank_weight": 3.0, "length_penalty": 0.0}, {"length_penalty": 0.5, "answers": "pairs"}],
    PRO: [{}, {"score_temperature": False, "sft_weight": 0.0}, {"sft_weight": 0.7, "answers": "pairs"}],
    Listwise: [
        {},
        {"temperature": 0.3, "student_temperature": 2.0, "length_penalty": 0.0},
        {"scores": "teacher", "temperature": 0.5},
        {"scores": "teacher", "answers": "pairs"},
    ],
    RewardModel: [{}, {"center": 0.3, "answers": "scores"}],
    Contrastive: [
        {},
        {"pooling": "last", "temperature": 0.5, "answers": "scores"},
        {"anchor": "top", "temperature": 0.3, "answers": "scores"},
        {"anchor": "top", "pooling": "last", "temperature": 1.0, "answers": "scores"},
    ],
    PolicyGradient: [
        {},
        {"discount": 1.0, "coef": 0.5},
        {"discount": 0.95, "length_norm": True, "coef": 2.0, "normalize": "whiten", "clip": 0.2, "reward_clip": 1.5},
        {"discount": 0.5, "own_reward": False, "length_norm": True, "normalize": "center"},
        {"is_clip": 1.1},
        {"clip": 0.1},
        {"reward_coef": 0.5, "discount": 1.0, "normalize": "center"},
        {"coef": None, "reward_coef": 2, "is_clip": 1.1},
    ],
}
VARIANTS = [(kind, settings) for kind, variants in SETTINGS.items() for settings in variants]
every_variant = pytest.mark.parametrize(
    ("kind", "settings"),
    VARIANTS,
    ids=[f"{kind.__name__}-{'-'.join(f'{k}={v}' for k, v in settings.items())}" for kind, settings in VARIANTS],
)
every_kind = pytest.mark.parametrize("kind", SETTINGS, ids=lambda kind: kind.__name__)


def fitted(kind: type[Objective], **settings: Any) -> Objective:
    torch.manual_seed(7)
    objective = kind(**settings)
    shape = ModelShape(layers=2, width=D, heads=1, kv_heads=1, head_width=D, vocab_size=V)
    objective.fit(shape, None)
    return objective.double()


def as_arrays(record: Any) -> SimpleNamespace:
    """A record of the api with numpy arrays in place of tensors."""
    return SimpleNamespace(
        **{
            f.name: v.detach().numpy() if isinstance(v := getattr(record, f.name), Tensor) else v
            for f in fields(record)
            if not f.name.startswith("_")
        }
    )


def oracle_of(objective: Objective, at: Case, settings: dict[str, Any]) -> Tensor:
    module = type(objective).__module__.rpartition(".")[2]
    parameters = {name: value.detach().numpy() for name, value in objective.named_parameters()}
    arguments = [as_arrays(record) for record in (at.batch, at.student(), at.teacher)]
    return torch.as_tensor(getattr(oracles, module)(*arguments, parameters=parameters, **settings))


def counted(objective: Objective, batch: Batch) -> Tensor:
    """The units that are summed: those that the objective has, and that are supervised."""
    units = objective.units(batch)
    return units & batch.mask if objective.unit is Unit.TOKEN else units


def value_of(objective: Objective, at: Case) -> Tensor:
    return objective(at.batch, at.student(), at.teacher)


def gradients(objective: Objective, at: Case) -> list[Tensor]:
    """Of a weighted sum of the counted units: to the student's log-probabilities, its states, and the parameters."""
    leaves = [at.logprobs.clone().requires_grad_(), at.hidden.clone().requires_grad_(), *objective.parameters()]
    value = objective(at.batch, StudentOutput(logprobs=leaves[0], hidden=leaves[1]), at.teacher)
    found = torch.autograd.grad(weighted(objective, at.batch, value), leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found, strict=True)]


def weighted(objective: Objective, batch: Batch, value: Tensor) -> Tensor:
    weights = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).view_as(value)
    return (value * weights)[counted(objective, batch)].sum()


# ------------------------------------------------------------------------------------- all of them


@every_variant
def test_equals_its_oracle_and_has_units_where_that_has_numbers(
    kind: type[Objective], settings: dict[str, Any]
) -> None:
    objective, at = fitted(kind, **settings), case()
    value, oracle = value_of(objective, at), oracle_of(objective, at, settings)
    units = counted(objective, at.batch)
    assert units.any() and not units.all()
    assert not oracle[units].isnan().any()
    if kind.unit is not Unit.TOKEN:  # of a worse answer no target counts
        assert torch.equal(units, ~oracle.isnan())
    assert value.isfinite().all(), "the rest may be anything finite"
    torch.testing.assert_close(value[units], oracle[units], rtol=1e-6, atol=1e-9)  # parameters are float32


@every_variant
def test_gradient_is_the_slope_of_the_value(
    kind: type[Objective], settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Detached tensors are held at their values, in the order in which they are asked for."""
    objective, at = fitted(kind, **settings), case()
    exact = gradients(objective, at)
    tape: list[Tensor] = []
    plain = Tensor.detach
    monkeypatch.setattr(Tensor, "detach", lambda self: tape.append(plain(self).clone()) or tape[-1])
    objective(at.batch, at.student(), at.teacher)
    recorded, step = list(tape), 1e-5
    assert bool(recorded) == getattr(objective, "stops_gradient", False)

    def end(name: str, index: tuple[int, ...], sign: int) -> float:
        moved: dict[str, Any] = {"logprobs": at.logprobs, "hidden": at.hidden}
        moved[name] = moved[name].clone()
        moved[name][index] += sign * step
        queue = iter(recorded)
        monkeypatch.setattr(Tensor, "detach", lambda self: next(queue))
        with torch.no_grad():
            return float(weighted(objective, at.batch, objective(at.batch, StudentOutput(**moved), at.teacher)))

    name, gradient = ("hidden", exact[1]) if kind.scope is Scope.STATES else ("logprobs", exact[0])
    slopes = torch.zeros_like(gradient)
    for index in product(*map(range, gradient.shape)):
        slopes[index] = (end(name, index, 1) - end(name, index, -1)) / (2 * step)
    torch.testing.assert_close(gradient, slopes, rtol=1e-6, atol=1e-6 * float(slopes.abs().max()))
    assert gradient.abs().max() > 1e-3


@every_variant
def test_garbage_where_nothing_is_supervised_changes_nothing(kind: type[Objective], settings: dict[str, Any]) -> None:
    objective, at = fitted(kind, **settings), case()
    nan = float("nan")
    teacher = replace(
        at.teacher,
        logprobs=at.teacher.logprobs.masked_fill(~at.batch.mask, nan),  # pyright: ignore
        reference_logprobs=at.teacher.reference_logprobs.masked_fill(~at.batch.mask, nan),  # pyright: ignore
    )
    old = at.batch.old_logprobs.masked_fill(~at.batch.mask, nan)  # pyright: ignore
    batch = replace(at.batch, old_logprobs=old, targets=at.batch.targets.masked_fill(~at.batch.mask, -100))
    spoiled = Case(batch, at.logprobs, at.hidden.masked_fill(~at.batch.attention_mask[..., None], nan), teacher)
    value = value_of(objective, spoiled)
    assert value.isfinite().all()
    torch.testing.assert_close(value, value_of(objective, at), rtol=0, atol=0)
    for one, other in zip(gradients(objective, spoiled), gradients(objective, at), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert not gradients(objective, at)[0][~at.batch.mask].any()


@every_variant
def test_a_group_alone_has_the_value_it_has_among_others(kind: type[Objective], settings: dict[str, Any]) -> None:
    objective, whole = fitted(kind, **settings), case()
    units, value = counted(objective, whole.batch), value_of(objective, whole)
    seen = 0
    for group in range(7):
        members = [i for i, a in enumerate(MIXED) if a.group == group]
        part = slice(members[0], members[-1] + 1)
        segment = whole.batch.segment[part]
        old = whole.batch.old_logprobs
        alone = Batch(
            input_ids=whole.batch.input_ids[part],
            targets=whole.batch.targets[part],
            mask=whole.batch.mask[part],
            attention_mask=whole.batch.attention_mask[part],
            segment=torch.where(segment < 0, -1, segment - members[0]),
            weight=torch.ones(len(members)),
            score=whole.batch.score[part],
            rejected=whole.batch.rejected[part] if whole.batch.rejected is not None else None,
            group_index=torch.zeros(len(members), dtype=torch.long),
            old_logprobs=None if old is None else old[part],
        )
        teacher = TeacherSignal(
            logprobs=whole.teacher.logprobs[part],  # pyright: ignore
            reference_logprobs=whole.teacher.reference_logprobs[part],  # pyright: ignore
            reward=whole.teacher.reward[part],  # pyright: ignore
        )
        at = Case(alone, whole.logprobs[part], whole.hidden[part], teacher)
        there = slice(group, group + 1) if kind.unit is Unit.GROUP else part
        assert torch.equal(counted(objective, alone), units[there])
        torch.testing.assert_close(value_of(objective, at), value[there])
        seen += int(units[there].sum())
    assert seen == int(units.sum())


@every_variant
def test_packing_does_not_matter(kind: type[Objective], settings: dict[str, Any]) -> None:
    objective, apart = fitted(kind, **settings), case()
    packed = case(rows=[range(5), range(5, 9), range(9, 16), [16]])
    one, other = counted(objective, apart.batch), counted(objective, packed.batch)
    a, b = value_of(objective, apart), value_of(objective, packed)
    if kind.unit is not Unit.TOKEN:
        assert torch.equal(one, other)
    torch.testing.assert_close(a[one], b[other])


@every_variant
def test_numbers_of_any_size_stay_finite(kind: type[Objective], settings: dict[str, Any]) -> None:
    """In float32, log-probabilities of answers from 0 to -10,000 on every side."""
    objective = fitted(kind, **settings).float()
    for own, other in ((0.0, -5e3), (-5e3, 0.0), (0.0, 0.0), (-5e3, -5e3)):
        at = case().to(torch.float32)
        sign = torch.tensor([1.0 if i % 2 else 0.0 for i in range(len(MIXED))])[at.batch.segment.clamp(min=0)]
        at.logprobs = torch.where(at.batch.mask, own * sign, 0.0)
        against = torch.where(at.batch.mask, other * sign, 0.0)
        at.teacher = replace(at.teacher, logprobs=against, reference_logprobs=against)
        at.batch = replace(at.batch, old_logprobs=against)
        at.hidden = 1e4 * at.hidden
        assert value_of(objective, at).isfinite().all()
        assert all(g.isfinite().all() for g in gradients(objective, at))


@every_variant
def test_nothing_to_train_on_is_zero_with_a_graph(kind: type[Objective], settings: dict[str, Any]) -> None:
    objective, at = fitted(kind, **settings), case()
    at.batch = replace(at.batch, mask=torch.zeros_like(at.batch.mask))
    leaf, states = torch.zeros_like(at.logprobs).requires_grad_(), at.hidden.clone().requires_grad_()
    value = objective(at.batch, StudentOutput(logprobs=leaf, hidden=states), at.teacher)
    assert value.isfinite().all()
    if settings.get("anchor") != "top":  # it reads texts, not targets
        assert not counted(objective, at.batch).any()
    value.masked_fill(~counted(objective, at.batch).view_as(value), 0.0).sum().backward()
    gradient = states.grad if kind.scope is Scope.STATES else leaf.grad
    assert gradient is not None
    assert gradient.isfinite().all()


@every_kind
def test_settings_are_read_when_used(kind: type[Objective]) -> None:
    at = case()
    for settings in SETTINGS[kind]:
        numbers = {k: v for k, v in settings.items() if isinstance(v, float)}
        changed = fitted(kind, **{k: v for k, v in settings.items() if k not in numbers and k != "own_reward"})
        for name, number in numbers.items():
            setattr(changed, name, number)
        if "own_reward" in settings:
            changed.own_reward = settings["own_reward"]
        torch.testing.assert_close(value_of(changed, at), value_of(fitted(kind, **settings), at))


@every_kind
def test_declares_what_it_needs(kind: type[Objective]) -> None:
    """Without what it does not ask for it runs; without what it asks for it says so."""
    for settings in SETTINGS[kind]:
        objective, at = fitted(kind, **settings), case()
        fields_of = {
            Need.LOGPROBS: "logprobs",
            Need.REFERENCE: "reference_logprobs",
            Need.REWARD: "reward",
        }
        assert not objective.needs & ~(Need.LOGPROBS | Need.REFERENCE | Need.REWARD)
        given = {name: getattr(at.teacher, name) for need, name in fields_of.items() if need in objective.needs}
        objective(at.batch, at.student(), TeacherSignal(**given))
        if objective.needs:
            with pytest.raises(AssertionError, match="were not asked for"):
                objective(at.batch, at.student(), TeacherSignal())


@pytest.mark.parametrize(
    "kind", [k for k in SETTINGS if k.unit is Unit.GROUP and k is not Listwise], ids=lambda k: k.__name__
)
def test_only_the_order_of_scores_counts_where_no_score_is_in_the_formula(kind: type[Objective]) -> None:
    settings: dict[str, Any] = {"score_temperature": False} if kind is PRO else {}
    objective = fitted(kind, answers="scores", **settings)
    at = case()
    one = value_of(objective, at)
    at.batch = replace(at.batch, score=[None if s is None else s**3 + 10 * s for s in at.batch.score])
    torch.testing.assert_close(value_of(objective, at), one)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (DPO, {"beta": 0.0}, "beta is 0.0; set a number above 0"),
        (DPO, {"label_smoothing": 1.0}, "label_smoothing is 1.0"),
        (IPO, {"reference": "teachers"}, "set student, teacher or none"),
        (KTO, {"undesirable_weight": -1.0}, "undesirable_weight is -1.0"),
        (KTO, {"baseline": "batch"}, "set none or group"),
        (ORPO, {"alpha": -0.1}, "alpha is -0.1"),
        (SimPO, {"beta": -1.0}, "beta is -1.0"),
        (SLiC, {"margin": -1.0}, "margin is -1.0"),
        (RRHF, {"rank_weight": float("nan")}, "rank_weight is nan"),
        (PRO, {"sft_weight": -1.0}, "sft_weight is -1.0"),
        (Listwise, {"student_temperature": 0.0}, "student_temperature is 0.0"),
        (Listwise, {"scores": "model"}, "set data or teacher"),
        (RewardModel, {"center": -1.0}, "center is -1.0"),
        (Contrastive, {"temperature": 0.0}, "temperature is 0.0"),
        (Contrastive, {"anchor": "last"}, "set prompt or top"),
        (Contrastive, {"anchor": "top"}, "set answers=scores"),
        (RRHF, {"answers": "all"}, "set pairs or scores"),
        (Contrastive, {"pooling": "max"}, "set mean or last"),
        (DPKD, {"variant": "kto"}, "set dpo, ipo or dpop"),
        (DPKD, {"beta": 0.0}, "beta is 0.0"),
        (DPKD, {"label_smoothing": -0.1}, "label_smoothing is -0.1"),
        (DPKD, {"penalty": -1.0}, "penalty is -1.0"),
        (DistiLLM2, {"alpha": 1.0}, "alpha is 1.0"),
        (DistiLLM2, {"beta": 2.5}, "beta is 2.5"),
        (PolicyGradient, {"coef": 0.0}, "coef is 0.0"),
        (PolicyGradient, {"reward_coef": -1.0}, "reward_coef is -1.0"),
        (PolicyGradient, {"coef": None}, "leaves no reward"),
        (PolicyGradient, {"discount": 1.5}, "discount is 1.5"),
        (PolicyGradient, {"own_reward": False}, "leaves no reward"),
        (PolicyGradient, {"normalize": "batch"}, "set none, center or whiten"),
        (PolicyGradient, {"clip": 0.0}, "clip is 0.0"),
        (PolicyGradient, {"clip": 0.2, "is_clip": 2.0}, "set one to null"),
    ],
)
def test_settings_outside_the_formula_are_refused(kind: type[Objective], settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        kind(**settings)


def test_columns_follow_what_is_compared() -> None:
    pairs, scores = frozenset({"rejected"}), frozenset({"score", "group"})
    assert (DPO().columns, DPO(answers="scores").columns) == (pairs, scores)
    assert (RRHF().columns, RRHF(answers="pairs").columns) == (scores, pairs)
    assert (KTO().columns, KTO(answers="pairs").columns) == (frozenset({"score"}), pairs)
    assert KTO(baseline="group").columns == scores, "other answers to the prompt are those of its group"
    assert DistiLLM2().columns == pairs
    for kind in SETTINGS:
        assert (kind.columns, kind.needs) == (kind().columns, kind().needs), "a class speaks for its defaults"


@pytest.mark.parametrize("kind", [k for k in SETTINGS if k is not PolicyGradient], ids=lambda k: k.__name__)
def test_compares_either_pairs_or_scores(kind: type[Objective]) -> None:
    """In a batch that has both: groups 0, 2 and 6 are pairs, of which 2 has lost its better answer."""
    batch, groups = case().batch, torch.tensor([a.group for a in MIXED])
    paired = torch.isin(groups, torch.tensor([0, 2, 6]))
    for answers in ("pairs", "scores"):
        units = fitted(kind, answers=answers).units(batch)
        if kind.unit is Unit.GROUP:
            kept = {"pairs": [0, 6], "scores": [1, 4, 5] if kind is Listwise else [1, 5]}
            assert units.nonzero()[:, 0].tolist() == kept[answers]
        else:
            scored = torch.tensor([a.score is not None for a in MIXED])
            known = paired if answers == "pairs" else scored & ~paired
            assert torch.equal(units, known & (batch.targets_by_sequence() > 0))


def test_needs_follow_the_reference() -> None:
    assert [DPO(reference=r).needs for r in ("student", "teacher", "none")] == [  # pyright: ignore
        Need.REFERENCE,
        Need.LOGPROBS,
        Need.NOTHING,
    ]


def test_the_reference_is_no_teachers_to_provide_but_log_probabilities_are() -> None:
    nothing: dict[str, Any] = {"teacher": NoTeacher()}
    assert cross._needs({}, nothing | {"objective.it": DPO()}) == []
    (problem,) = cross._needs({}, nothing | {"objective.it": DPO(reference="teacher")})
    assert problem.startswith("objective.it: DPO needs the teacher's logprobs")


# ------------------------------------------------------------------------------------- by hand

PAIR = [Answer(2), Answer(4, rejected=True)]


def of_pair(
    objective: Objective, better: Sequence[float], worse: Sequence[float], reference: Sequence[float] = (0.0, 0.0)
) -> float:
    """The value of one preference pair with these log-probabilities of its targets; the reference's sums."""
    answers = [Answer(len(better)), Answer(len(worse), rejected=True)]
    batch = batch_of(answers)
    logprobs = torch.zeros(batch.mask.shape, dtype=torch.float64)
    logprobs[batch.mask] = torch.tensor([*better, *worse], dtype=torch.float64)
    other = torch.zeros_like(logprobs)
    for row, total in enumerate(reference):
        other[row, int(batch.mask[row].nonzero()[0])] = total
    value = objective(batch, StudentOutput(logprobs=logprobs), TeacherSignal(reference_logprobs=other))
    return float(value[0])


def test_dpo_by_hand() -> None:
    """h = (-3 - (-4)) - (-6 - (-5)) = 2, beta h = 1: log(1 + 1/e) = 0.313262; with a tenth of wrong labels
    0.9 log(1 + 1/e) + 0.1 log(1 + e) = 0.413262. Of means, h = (-1.5 + 2) - (-2 + 5/3) = 0.8333."""
    better, worse, reference = [-1.0, -2.0], [-1.0, -2.0, -3.0], (-4.0, -5.0)
    assert of_pair(DPO(beta=0.5), better, worse, reference) == pytest.approx(0.3132617)
    assert of_pair(DPO(beta=0.5, label_smoothing=0.1), better, worse, reference) == pytest.approx(0.4132617)
    means = of_pair(DPO(beta=0.5, length_normalize=True), better, worse, reference)
    assert means == pytest.approx(math.log1p(math.exp(-0.5 * 5 / 6)))


def test_dpo_begins_at_log_two() -> None:
    at = case()
    at.teacher = TeacherSignal(reference_logprobs=at.logprobs)
    value = value_of(DPO(), at)
    units = DPO().units(at.batch)
    torch.testing.assert_close(value[units], torch.full_like(value[units], math.log(2)))


def test_ipo_by_hand() -> None:
    """h = 2 as for DPO; at tau = 0.25 the target is 2 too, at 0.1 it is 5: (2 - 5)^2 = 9."""
    better, worse, reference = [-1.0, -2.0], [-1.0, -2.0, -3.0], (-4.0, -5.0)
    assert of_pair(IPO(beta=0.25), better, worse, reference) == pytest.approx(0.0)
    assert of_pair(IPO(beta=0.1), better, worse, reference) == pytest.approx(9.0)


def test_orpo_by_hand() -> None:
    """Mean probabilities 1/2 and 1/4 have the odds 1 and 1/3: log 2 - alpha log(3/4), 3/4 = sigmoid(log 3)."""
    better, worse = [math.log(0.5)] * 2, [math.log(0.25)] * 3
    assert of_pair(ORPO(alpha=2.0), better, worse) == pytest.approx(math.log(2) - 2 * math.log(0.75))


def test_simpo_by_hand() -> None:
    """Means -1.5 and -2: 2 x 0.5 - 0.5 = 0.5, log(1 + e^-0.5) = 0.474077; HALOs' form 2 (0.5 - 0.25) is the same."""
    assert of_pair(SimPO(), [-1.0, -2.0], [-1.0, -2.0, -3.0]) == pytest.approx(0.4740770)


def test_slic_by_hand() -> None:
    """Sums -3 and -6: led by 3, so only 0.1 x 3 is left; with a margin of 4 one nat more."""
    assert of_pair(SLiC(), [-1.0, -2.0], [-1.0, -2.0, -3.0]) == pytest.approx(0.3)
    assert of_pair(SLiC(margin=4.0), [-1.0, -2.0], [-1.0, -2.0, -3.0]) == pytest.approx(1.3)


def test_kto_by_hand() -> None:
    """r = 1 and -2. Better: its pair's r is -2, so z = 0, 1 - sigmoid(0.5). Worse: z = 1, 1 - sigmoid(0.5 x 3)."""
    batch = batch_of([Answer(1), Answer(1, rejected=True)])
    logprobs = torch.zeros(batch.mask.shape, dtype=torch.float64)
    logprobs[batch.mask] = torch.tensor([1.0, -2.0], dtype=torch.float64)
    reference = TeacherSignal(reference_logprobs=torch.zeros_like(logprobs))
    objective = KTO(answers="pairs", baseline="group", beta=0.5, undesirable_weight=3.0)
    value = objective(batch, StudentOutput(logprobs=logprobs), reference)
    assert value.tolist() == pytest.approx([1 / (1 + math.exp(0.5)), 3 / (1 + math.exp(1.5))])


def of_group(objective: Objective, means: Sequence[float], scores: Sequence[float], length: int = 2) -> float:
    """The value of one scored group of answers of `length` targets with these mean log-probabilities."""
    batch = batch_of([Answer(length, score=s) for s in scores])
    logprobs = torch.zeros(batch.mask.shape, dtype=torch.float64)
    logprobs[batch.mask] = torch.tensor(means, dtype=torch.float64).repeat_interleave(length)
    return float(objective(batch, StudentOutput(logprobs=logprobs), TeacherSignal())[0])


def test_rrhf_by_hand() -> None:
    """Means -1, -3, -2 in the order of merit 1 > 2 > 3: only 3 overtakes 2, by 1 nat; and 1 nat for the best."""
    assert of_group(RRHF(), [-1.0, -3.0, -2.0], [9.0, 5.0, 1.0]) == pytest.approx(2.0)
    assert of_group(RRHF(rank_weight=100.0), [-1.0, -3.0, -2.0], [9.0, 5.0, 1.0]) == pytest.approx(101.0)
    assert of_group(RRHF(length_penalty=0.0), [-1.0, -3.0, -2.0], [9.0, 5.0, 1.0]) == pytest.approx(3.0)


def test_pro_by_hand() -> None:
    """Scores 3, 2, 0 and means -1, -2, -3. First answer: differences 1 and 3, itself at 3: log(e^-3 + e^-2 + e^-9) + 3.
    Second: difference 2, log(e^-4 + e^-6) + 4. Fine-tuning: 0.05 x (3 - 1)^2 x 2 targets x 1 nat = 0.4."""
    first = math.log(math.exp(-3) + math.exp(-2) + math.exp(-9)) + 3
    second = math.log(math.exp(-4) + math.exp(-6)) + 4
    assert of_group(PRO(), [-1.0, -2.0, -3.0], [3.0, 2.0, 0.0]) == pytest.approx(first + second + 0.4)


def test_pro_without_temperatures_is_the_plackett_luce_likelihood() -> None:
    """Softmaxes of what is left: (1/2) / 1 of all, then (1/3) / (1/2) of the rest."""
    means = [math.log(1 / 2), math.log(1 / 3), math.log(1 / 6)]
    objective = PRO(score_temperature=False, sft_weight=0.0)
    assert of_group(objective, means, [3.0, 2.0, 0.0]) == pytest.approx(-math.log(1 / 2) - math.log(2 / 3))


def test_listwise_by_hand() -> None:
    """p = (3/4, 1/4) from scores log 3 and 0, q = (1/2, 1/2): KL = log 2 - H(p) = 0.130812."""
    value = of_group(Listwise(), [-1.0, -1.0], [math.log(3), 0.0])
    assert value == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert of_group(Listwise(temperature=1e6), [-1.0, -1.0], [math.log(3), 0.0]) == pytest.approx(0.0, abs=1e-9)


def test_listwise_of_the_teacher_vanishes_at_the_teacher() -> None:
    objective, at = Listwise(scores="teacher", length_penalty=0.0), case()
    at.teacher = TeacherSignal(logprobs=at.logprobs)
    assert objective.zero_at_teacher
    assert not Listwise().zero_at_teacher
    assert value_of(objective, at).abs().max() < 1e-12
    assert gradients(objective, at)[0].abs().max() < 1e-12
    assert (value_of(objective, case())[objective.units(at.batch)] > 0).all()


def test_reward_model_by_hand() -> None:
    """Rewards 2 and 1 read at the end of the answers: log(1 + e^-1), and 0.1 x 3^2 for the offset."""
    batch = batch_of(PAIR)
    objective = fitted(RewardModel, center=0.1)
    objective.value = torch.nn.Parameter(torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64))
    hidden = torch.full((*batch.mask.shape, D), 50.0, dtype=torch.float64)
    for row, reward in enumerate((2.0, 1.0)):
        end = int(batch.mask[row].nonzero()[-1]) + 1  # where the last target has been read
        hidden[row, end, 0] = reward
    value = objective(batch, StudentOutput(hidden=hidden), TeacherSignal())
    assert value.item() == pytest.approx(math.log1p(math.exp(-1)) + 0.9)


def test_reward_model_begins_as_in_the_paper_and_is_saved() -> None:
    objective = RewardModel()
    objective.fit(ModelShape(layers=1, width=4000, heads=1, kv_heads=1, head_width=4, vocab_size=9), None)
    assert objective.value is not None
    assert float(objective.value.detach().square().mean()) == pytest.approx(1 / 4001, rel=0.1)
    assert list(objective.state_dict()) == ["value"]


def test_contrastive_by_hand() -> None:
    """Unit vectors: query (1, 0), positive at 60 degrees (cosine 1/2), negative opposite (cosine -1), temperature 1/2:
    log(1 + e^((-1 - 1/2) / (1/2))) = log(1 + e^-3)."""
    batch = batch_of([Answer(2, prompt=1), Answer(2, prompt=1, rejected=True)])
    hidden = torch.zeros(*batch.mask.shape, 2, dtype=torch.float64)
    hidden[:, 0, 0] = 5.0  # the prompt of either
    hidden[0, 1:3] = torch.tensor([0.5, math.sqrt(0.75)], dtype=torch.float64) * torch.tensor([[1.0], [9.0]])
    hidden[1, 1:3] = torch.tensor([-1.0, 0.0])
    value = Contrastive(temperature=0.5)(batch, StudentOutput(hidden=hidden), TeacherSignal())
    assert value.item() == pytest.approx(math.log1p(math.exp(-3)))


def test_the_last_token_of_a_row_that_ends_with_it_is_never_read() -> None:
    """Two packed sequences of a prompt token and two targets, whose last tokens are targets only."""
    batch = batch_of([Answer(2, prompt=1), Answer(2, prompt=1)])
    batch.segment = torch.tensor([[0, 0, 1, 1]])
    batch.attention_mask = batch.mask = torch.ones(1, 4, dtype=torch.bool)
    assert read_answer(batch).tolist() == [[False, True, False, True]]
    assert read_prompt(batch).tolist() == [[True, False, True, False]]
    vectors = torch.tensor([[[1.0], [2.0], [4.0], [8.0]]])
    assert pooled(batch, vectors, read_text(batch), "last").tolist() == [[2.0], [8.0]]
    assert pooled(batch, vectors, read_text(batch), "mean").tolist() == [[1.5], [6.0]]
    assert pooled(batch, vectors.bfloat16(), read_text(batch), "mean").dtype == torch.float32


def test_a_query_of_its_own_is_the_best_of_its_group() -> None:
    """Query (1, 0), positive (0, 2) at cosine 0, negative (3, 0) at cosine 1; all that is read of a sequence is text.
    The order of the rows does not matter."""
    answers = [Answer(1, score=2.0), Answer(1, score=1.0), Answer(1, score=0.0)]
    vectors = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]], dtype=torch.float64)
    objective = Contrastive(answers="scores", anchor="top", temperature=1.0)
    for order in permutations(range(3)):
        batch = batch_of([answers[i] for i in order])
        hidden = vectors[list(order)].unsqueeze(1).expand(-1, batch.mask.shape[1], -1)
        value = objective(batch, StudentOutput(hidden=hidden), TeacherSignal())
        assert value.item() == pytest.approx(math.log1p(math.e))


# ------------------------------------------------------------------------------------- policy gradient


def policy_value(objective: Objective, log_p: Sequence[float], log_q: Sequence[float], old: Any = None) -> list[float]:
    batch = batch_of([Answer(len(log_p))])

    def spread(values: Sequence[float]) -> Tensor:
        whole = torch.zeros(batch.mask.shape, dtype=torch.float64)
        whole[batch.mask] = torch.tensor(values, dtype=torch.float64)
        return whole

    batch.old_logprobs = None if old is None else spread(old)
    value = objective(batch, StudentOutput(logprobs=spread(log_q)), TeacherSignal(logprobs=spread(log_p)))
    return value[batch.mask].tolist()


@pytest.mark.parametrize(
    ("settings", "advantages"),
    [
        ({}, [1.0, -2.0, 3.0]),
        ({"coef": 2.0, "reward_clip": 3.0}, [2.0, -3.0, 3.0]),
        ({"discount": 0.5}, [1.0 - 1.0 + 0.75, -2.0 + 1.5, 3.0]),
        ({"discount": 1.0}, [2.0, 1.0, 3.0]),
        ({"discount": 1.0, "length_norm": True}, [2 / 3, 1 / 2, 3.0]),
        ({"discount": 1.0, "own_reward": False}, [1.0, 3.0, 0.0]),
        ({"discount": 1.0, "own_reward": False, "length_norm": True}, [1 / 2, 3.0, 0.0]),
        ({"normalize": "center"}, [1 / 3, -8 / 3, 7 / 3]),
        ({"discount": 1.0, "normalize": "center"}, [0.0, -1.0, 1.0]),
        ({"discount": 1.0, "normalize": "whiten"}, [0.0, -math.sqrt(1.5), math.sqrt(1.5)]),
    ],
)
def test_advantages_by_hand(settings: dict[str, Any], advantages: list[float]) -> None:
    """Rewards log p - log q of 1, -2, 3 at ratio 1, so that the value is minus the advantage."""
    values = policy_value(PolicyGradient(**settings), [-1.0, -4.0, -2.0], [-2.0, -2.0, -5.0])
    assert values == pytest.approx([-a for a in advantages], abs=1e-7)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [-1.0 * 2, 2.0 / 2, -3.0]),
        ({"clip": 0.2}, [-1.0 * 1.2, 2.0 * 0.8, -3.0]),  # PPO: the larger loss of both
        ({"is_clip": 1.5}, [-1.0 * 1.5, 2.0 / 2, -3.0]),
    ],
)
def test_ratios_to_the_writer_by_hand(settings: dict[str, Any], expected: list[float]) -> None:
    """Advantages 1, -2, 3 and ratios q / q_old of 2, 1/2, 1."""
    old = [-2.0 - math.log(2), -2.0 + math.log(2), -5.0]
    values = policy_value(PolicyGradient(**settings), [-1.0, -4.0, -2.0], [-2.0, -2.0, -5.0], old)
    assert values == pytest.approx(expected)


def test_a_clipped_weight_still_moves_the_student() -> None:
    """d value = -A min(rho, is_clip) d log q = -1 x 1.5; with PPO's clip the gradient there is 0."""
    batch = batch_of([Answer(1)])
    batch.old_logprobs = torch.full(batch.mask.shape, -2.0 - math.log(2))
    cases: list[tuple[dict[str, Any], float]] = [({"is_clip": 1.5}, -1.5), ({"clip": 0.2}, 0.0)]
    for settings, slope in cases:
        log_q = torch.full(batch.mask.shape, -2.0).requires_grad_()
        teacher = TeacherSignal(logprobs=torch.full(batch.mask.shape, -1.0))
        PolicyGradient(**settings)(batch, StudentOutput(logprobs=log_q), teacher)[batch.mask].sum().backward()
        assert log_q.grad is not None
        assert float(log_q.grad[batch.mask]) == pytest.approx(slope)


class Table:
    """Two models of sequences of two tokens from three, by tables of logits: everything can be summed exactly."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(11)
        self.z = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((3,), (3, 3))]
        self.y = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((3,), (3, 3))]
        for z in self.z:
            z.requires_grad_()

    @staticmethod
    def logprobs(tables: list[Tensor], first: int, second: int) -> Tensor:
        return torch.stack([tables[0].log_softmax(-1)[first], tables[1].log_softmax(-1)[first, second]])

    def gradient(self, value: Tensor) -> Tensor:
        found = torch.autograd.grad(value, self.z, allow_unused=True, retain_graph=True)
        return torch.cat(
            [(torch.zeros_like(z) if g is None else g).flatten() for z, g in zip(self.z, found, strict=True)]
        )

    def expected(self, objective: Objective, share: float = 0.0, told: bool = True) -> Tensor:
        """E of the surrogate's gradient, summed over targets, over text of the mixture with this share of the teacher.
        Unless `told`, the batch does not say who wrote it."""
        batch = batch_of([Answer(2, prompt=1)], pad=0)
        total = torch.zeros(12, dtype=torch.float64)
        for first, second in product(range(3), repeat=2):
            q, p = self.logprobs(self.z, first, second), self.logprobs(self.y, first, second)
            writer = torch.log((1 - share) * q.exp() + share * p.exp()).detach()
            zeros = torch.zeros(batch.mask.shape, dtype=torch.float64)
            log_q, log_p, old = (zeros.masked_scatter(batch.mask, values) for values in (q, p, writer))
            batch.old_logprobs = old if told else None
            value = objective(batch, StudentOutput(logprobs=log_q), TeacherSignal(logprobs=log_p))
            total += writer.sum().exp() * self.gradient(value[batch.mask].sum())
        return total

    def kl(self) -> Tensor:
        """KL(q || p) of sequences."""
        pairs = product(range(3), repeat=2)
        each = [(self.logprobs(self.z, *s).sum(), self.logprobs(self.y, *s).sum()) for s in pairs]
        return sum((q.exp() * (q - p) for q, p in each), torch.zeros(()))

    def kl_of_targets(self) -> Tensor:
        """sum_t KL(q_t || p_t) over the student's contexts, which are held fixed."""
        log_q, log_p = (([t.log_softmax(-1) for t in tables]) for tables in (self.z, self.y))
        kls = [(q.exp() * (q - p)).sum(-1) for q, p in zip(log_q, log_p, strict=True)]
        return kls[0] + (log_q[0].exp().detach() * kls[1]).sum()


def test_the_expected_gradient_is_that_of_each_targets_kl_without_discounting() -> None:
    table = Table()
    torch.testing.assert_close(table.expected(PolicyGradient()), table.gradient(table.kl_of_targets()))


def test_the_expected_gradient_is_that_of_the_sequences_kl_when_all_that_follows_counts() -> None:
    table = Table()
    gradient = table.gradient(table.kl())
    torch.testing.assert_close(table.expected(PolicyGradient(discount=1.0)), gradient)
    assert (gradient - table.gradient(table.kl_of_targets())).abs().max() > 1e-2


def test_minillms_decomposition_is_exact() -> None:
    """Reverse KL of each target, exactly, plus what follows by policy gradient."""
    table = Table()
    following = table.expected(PolicyGradient(discount=1.0, own_reward=False))
    torch.testing.assert_close(following + table.gradient(table.kl_of_targets()), table.gradient(table.kl()))


def test_old_logprobs_of_a_mixture_weigh_what_it_wrote() -> None:
    """With one target there are no prefixes to weigh: the first target's gradient is exact under the mixture too."""
    table = Table()
    exact = table.gradient(table.kl_of_targets())[:3]
    torch.testing.assert_close(table.expected(PolicyGradient(), share=0.2)[:3], exact)
    untold = table.expected(PolicyGradient(), share=0.2, told=False)
    assert (untold[:3] - exact).abs().max() > 1e-2, "as if the student had written it"


def test_advantages_carry_no_graph() -> None:
    """METHODS D20: d/d log q of -A rho with A and q_old fixed is -A, not -A + coef."""
    batch = batch_of([Answer(1)])
    log_q = torch.full(batch.mask.shape, -2.0).requires_grad_()
    value = PolicyGradient()(
        batch, StudentOutput(logprobs=log_q), TeacherSignal(logprobs=torch.full(batch.mask.shape, -1.5))
    )
    value[batch.mask].sum().backward()
    assert log_q.grad is not None
    assert float(log_q.grad[batch.mask]) == pytest.approx(-0.5)


# ------------------------------------------------------------------------------------- chunks of logits


def chunk(rejected: Sequence[bool] | None = (False, True, True, False)) -> tuple[Batch, Tensor, Tensor]:
    """Targets of four sequences that take turns in one chunk, and logits [1, C, V] of teacher and student."""
    generator = torch.Generator().manual_seed(5)
    size = 10
    y, z = (2 * torch.randn(1, size, V, generator=generator, dtype=torch.float64) for _ in range(2))
    ids = torch.randint(0, V, (1, size + 1), generator=generator)
    everywhere = torch.ones(1, size, dtype=torch.bool)
    batch = Batch(
        input_ids=ids[:, :-1],
        targets=ids[:, 1:],
        mask=everywhere,
        attention_mask=everywhere,
        segment=torch.tensor([[0, 0, 1, 1, 1, 2, 0, 3, 3, 2]]),
        weight=torch.ones(4),
        rejected=None if rejected is None else torch.tensor(rejected),
    )
    return batch, y, z


DPKD_SETTINGS: list[dict[str, Any]] = [
    {},
    {"beta": 2.0, "label_smoothing": 0.3},
    {"variant": "ipo", "beta": 0.7},
    {"variant": "dpop", "penalty": 3.0},
    {"variant": "dpop", "temperature": 2.0, "temperature_scale": "t2"},
]
DISTILLM2_SETTINGS: list[dict[str, Any]] = [
    {},
    {"alpha": 0.5, "beta": 1.4},
    {"beta": 2.0, "alpha": 0.0},
    {"temperature": 2.0, "temperature_scale": "t2"},
]


def by_autograd(objective: Objective, batch: Batch, z: Tensor, teacher: TeacherSignal) -> tuple[Tensor, Tensor]:
    leaf = z.clone().requires_grad_()
    value = objective(batch, StudentOutput(logits=leaf), teacher)
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), gradient


@pytest.mark.parametrize("settings", DPKD_SETTINGS)
def test_dpkd_equals_its_oracle(settings: dict[str, Any]) -> None:
    batch, y, z = chunk()
    value = DPKD(**settings)(batch, StudentOutput(logits=z), TeacherSignal(logits=y))
    rest = {k: v for k, v in settings.items() if not k.startswith("temperature")}
    t = settings.get("temperature", 1.0)
    scale = t**2 if "temperature_scale" in settings else 1.0
    expected = [scale * oracles.dpkd(y[0, c].numpy() / t, z[0, c].numpy() / t, 0, **rest) for c in range(y.shape[1])]
    np.testing.assert_allclose(value[0].numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("settings", DISTILLM2_SETTINGS)
@pytest.mark.parametrize("rejected", [None, (False,) * 4, (True,) * 4, (False, True, True, False)])
def test_distillm2_equals_its_oracle(settings: dict[str, Any], rejected: Any) -> None:
    batch, y, z = chunk(rejected)
    objective = DistiLLM2(**settings)
    value = objective(batch, StudentOutput(logits=z), TeacherSignal(logits=y))
    student, teacher = (SimpleNamespace(logits=logits.numpy()) for logits in (z, y))
    expected = oracles.distillm2(as_arrays(batch), student, teacher, **settings)
    np.testing.assert_allclose(value.numpy(), expected, rtol=1e-9, atol=1e-14)
    assert objective.units(batch).all()


@pytest.mark.parametrize(
    ("kind", "settings"), [(DPKD, s) for s in DPKD_SETTINGS] + [(DistiLLM2, s) for s in DISTILLM2_SETTINGS]
)
@pytest.mark.parametrize("rejected", [None, (True,) * 4, (False, True, True, False)])
def test_closed_forms_are_autograds(kind: type[Objective], settings: dict[str, Any], rejected: Any) -> None:
    batch, y, z = chunk(rejected)
    objective, teacher = kind(**settings), TeacherSignal(logits=y)
    value, gradient = by_autograd(objective, batch, z, teacher)
    with torch.no_grad():
        closed = objective.closed_form(batch, StudentOutput(logits=z), teacher)
    assert closed is not None
    torch.testing.assert_close(closed[0], value, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(closed[1], gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("settings", DPKD_SETTINGS)
def test_dpkds_gradient_is_the_slope_of_its_value(settings: dict[str, Any]) -> None:
    batch, y, z = chunk()
    objective, teacher, step = DPKD(**settings), TeacherSignal(logits=y), 1e-6
    _, gradient = by_autograd(objective, batch, z, teacher)
    for v in range(V):
        move = torch.zeros(V, dtype=torch.float64)
        move[v] = step
        ends = [objective(batch, StudentOutput(logits=z + s * move), teacher) for s in (1, -1)]
        torch.testing.assert_close((ends[0] - ends[1]) / (2 * step), gradient[..., v], rtol=1e-6, atol=1e-7)


def test_dpkd_by_hand() -> None:
    """p = (1/2, 1/4, 1/4), q = (1/4, 1/2, 1/4): h = log(1/2) - log 2 = -log 4; at beta 1/2 the loss is log(1 + 2);
    dpop adds 10 (log 1/2 - log 1/4) = 10 log 2; ipo (-log 4 - 1)^2."""
    batch, _, _ = chunk()
    y = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64).log().expand(1, 10, 3)
    z = torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64).log().expand(1, 10, 3)

    def value(**settings: Any) -> float:
        return float(DPKD(beta=0.5, **settings)(batch, StudentOutput(logits=z), TeacherSignal(logits=y))[0, 0])

    assert value() == pytest.approx(math.log(3))
    assert value(variant="dpop", penalty=10.0) == pytest.approx(math.log(3) + 10 * math.log(2))
    assert value(variant="ipo") == pytest.approx((math.log(4) + 1) ** 2)


def test_dpkd_has_no_gradient_where_both_put_the_same_token_first() -> None:
    batch, y, _ = chunk()
    value, gradient = by_autograd(DPKD(), batch, 3 * y, TeacherSignal(logits=y))
    torch.testing.assert_close(value, torch.full_like(value, math.log(2)))
    assert not gradient.any()


def test_dpkd_refuses_a_top_k_teacher() -> None:
    batch, y, z = chunk()
    logprobs, ids = torch.log_softmax(y, -1).topk(4)
    assert DPKD().needs == Need.LOGITS
    with pytest.raises(ConfigError, match="whole vocabulary"):
        DPKD()(batch, StudentOutput(logits=z), TeacherSignal(topk=TopK(ids=ids, logprobs=logprobs)))


@pytest.mark.parametrize("sparse", [False, True])
def test_distillm2_is_skew_kl_on_the_better_and_skew_reverse_kl_on_the_worse(sparse: bool) -> None:
    batch, y, z = chunk()
    teacher = TeacherSignal(logits=y)
    if sparse:
        logprobs, ids = torch.log_softmax(y, -1).topk(4)
        teacher = TeacherSignal(topk=TopK(ids=ids, logprobs=logprobs))
    objective = DistiLLM2(alpha=0.3, beta=1.5)
    value, gradient = by_autograd(objective, batch, z, teacher)
    better = by_autograd(SkewKL(alpha=0.3), batch, z, teacher)
    worse = by_autograd(SkewReverseKL(alpha=0.3, detach_mixture=True), batch, z, teacher)
    flows = by_autograd(SkewReverseKL(alpha=0.3), batch, z, teacher)
    of_student = torch.tensor([False, True, True, False])[batch.segment]
    torch.testing.assert_close(value, torch.where(of_student, 1.5 * worse[0], 0.5 * better[0]))
    torch.testing.assert_close(gradient, torch.where(of_student[..., None], 1.5 * worse[1], 0.5 * better[1]))
    assert (gradient - 1.5 * flows[1])[of_student].abs().max() > 1e-3, "no gradient goes through the mixture"
    closed = objective.closed_form(batch, StudentOutput(logits=z), teacher)
    assert closed is not None
    torch.testing.assert_close(closed[1], gradient)


def test_distillm2_vanishes_at_the_teacher() -> None:
    batch, y, _ = chunk()
    value, gradient = by_autograd(DistiLLM2(), batch, y + 3.0, TeacherSignal(logits=y))
    assert value.abs().max() < 1e-12
    assert gradient.abs().max() < 1e-12


def test_distillm2_averages_over_answers_unless_told_otherwise() -> None:
    assert DistiLLM2().reduction == "sequence"
    assert DistiLLM2(reduction="token").reduction == "token"


# ------------------------------------------------------------------------------------- log-probabilities


def test_log1mexp_is_accurate_at_both_ends_and_has_finite_gradients() -> None:
    """Near 0 it is log(-x) + x / 2 + O(x^2), far below it is -exp(x) + O(exp(2 x))."""
    near = torch.tensor([-1e-12, -1e-6], dtype=torch.float64)
    torch.testing.assert_close(log1mexp(near), (-near).log() + near / 2, rtol=1e-12, atol=1e-12)
    far = torch.tensor([-30.0, -600.0], dtype=torch.float64)
    torch.testing.assert_close(log1mexp(far), -far.exp(), rtol=1e-12, atol=0)
    x = torch.tensor([-1e4, -50.0, -1.0, -0.6931, -0.6932, -1e-6, -1e-30], requires_grad=True)
    log1mexp(x).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    torch.testing.assert_close(x.grad.double(), -1 / torch.expm1(-x.detach().double()), rtol=1e-5, atol=0)


def test_log_odds_stay_finite_at_probability_one() -> None:
    x = torch.tensor([0.0, -1e-9, -1e4], requires_grad=True)
    odds = log_odds(x)
    odds.sum().backward()
    assert odds.isfinite().all()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert log_odds(torch.tensor(math.log(0.75))).item() == pytest.approx(math.log(3), rel=1e-6)


@pytest.mark.parametrize("discount", [0.0, 0.3, 0.95, 1.0])
@pytest.mark.parametrize("length", [0, 1, 2, 5, 8, 13])
def test_discounted_sums_are_what_a_loop_gives(discount: float, length: int) -> None:
    values = torch.randn(3, length, dtype=torch.float64, generator=torch.Generator().manual_seed(length))
    expected, running = torch.zeros_like(values), torch.zeros(3, dtype=torch.float64)
    for t in reversed(range(length)):
        running = values[:, t] + discount * running
        expected[:, t] = running
    torch.testing.assert_close(discounted_sums(values, discount), expected)


# ------------------------------------------------------------------------------------- trained


def trainable(part: slice = slice(None)) -> Batch:
    """Two preference pairs and a scored group of three, as a batch for the toy models; or some of its groups."""
    answers = [
        Answer(4, prompt=3, group=0),
        Answer(6, prompt=3, group=0, rejected=True),
        Answer(5, prompt=3, group=1, score=2.0),
        Answer(3, prompt=3, group=1, score=1.0),
        Answer(4, prompt=3, group=1, score=-0.5),
        Answer(3, prompt=3, group=2),
        Answer(5, prompt=3, group=2, rejected=True),
    ]
    generator = torch.Generator().manual_seed(1)
    whole = batch_of(answers)
    ids = torch.randint(0, toys.VOCAB, whole.input_ids.shape, generator=generator)
    for first in (0, 2, 5):  # answers to one prompt
        same = torch.tensor([a.group == answers[first].group for a in answers])
        ids[same, :3] = ids[first, :3]
    kept = range(len(answers))[part]
    segment = whole.segment[part]
    return replace(
        whole,
        input_ids=ids[part],
        targets=ids.roll(-1, 1)[part],
        mask=whole.mask[part],
        attention_mask=whole.attention_mask[part],
        segment=torch.where(segment < 0, -1, segment - kept[0]),
        weight=torch.tensor([1.0, 1.0, 0.5, 0.5, 0.5, 2.0, 2.0])[part],
        row=whole.row[part],
        domain=whole.domain[part],
        group=whole.group[part],
        score=whole.score[part],
        rejected=whole.rejected[part] if whole.rejected is not None else None,
        group_index=torch.tensor([a.group - answers[kept[0]].group for a in answers])[part],
    )


class LogprobTeacher(toys.ToyTeacher):
    """A toy teacher that scores targets too."""

    provides = Need.DISTRIBUTION | Need.LOGITS | Need.LOGPROBS

    def annotate(self, batch: Batch, needs: Need) -> TeacherSignal:
        signal = super().annotate(batch, needs | Need.DISTRIBUTION)
        with torch.no_grad():
            assert signal.head is not None and signal.hidden is not None
            log_p = signal.head(signal.hidden).log_softmax(-1)
        return replace(signal, logprobs=log_p.gather(-1, batch.targets.unsqueeze(-1)).squeeze(-1))


TRAINED: list[Callable[[], Objective]] = [
    DPO,
    lambda: DPO(reference="teacher", beta=0.5),
    IPO,
    KTO,
    ORPO,
    SimPO,
    SLiC,
    RRHF,
    PRO,
    Listwise,
    lambda: Listwise(scores="teacher"),
    DPKD,
    lambda: DPKD(variant="dpop"),
    DistiLLM2,
    RewardModel,
    Contrastive,
    PolicyGradient,
    lambda: PolicyGradient(discount=0.95, length_norm=True, normalize="whiten", clip=0.2),
]
every_trained = pytest.mark.parametrize("make", TRAINED, ids=lambda m: inspect.getsource(m).strip()[:40].split("(")[0])


def distiller_of(objective: Objective) -> Distiller:
    torch.manual_seed(3)
    teacher = LogprobTeacher(toys.llama(2, layers=3, width=24))
    student = toys.ToyStudent(toys.llama(1))
    student.shape = lambda: ModelShape(  # pyright: ignore
        layers=2, width=16, heads=2, kv_heads=1, head_width=8, vocab_size=toys.VOCAB
    )
    return Distiller(student, teacher, {"it": objective})


def stepped(distiller: Distiller, parts: Sequence[Batch]) -> tuple[float, dict[str, Tensor]]:
    distiller.zero_grad()
    counts: dict[str, float] = {}
    for part in parts:
        for name, value in distiller.count(part).items():
            counts[name] = counts.get(name, 0.0) + value
    total = 0.0
    for part in parts:
        loss, _ = distiller(part, counts)
        loss.backward()
        total += float(loss.detach())
    return total, {n: p.grad.clone() for n, p in distiller.named_parameters() if p.grad is not None}


@every_trained
def test_a_step_does_not_depend_on_how_it_is_cut_between_groups(make: Callable[[], Objective]) -> None:
    distiller = distiller_of(make())
    loss, whole = stepped(distiller, [trainable()])
    cut, parts = stepped(distiller, [trainable(slice(0, 2)), trainable(slice(2, 5)), trainable(slice(5, 7))])
    assert cut == pytest.approx(loss, rel=1e-5, abs=1e-6)
    assert whole.keys() == parts.keys()
    scale = max(float(g.abs().max()) for g in whole.values())
    assert scale > 1e-5
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-4, atol=1e-5 * scale)


@every_trained
def test_training_lowers_it(make: Callable[[], Objective]) -> None:
    distiller = distiller_of(make())
    if not getattr(distiller.terms["it"], "falls", True):
        pytest.skip("its value is a surrogate")
    optimizer = torch.optim.Adam(distiller.parameters(), lr=3e-3)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        losses.append(stepped(distiller, [trainable()])[0])
        optimizer.step()
    assert losses[-1] < losses[0] - 1e-3 * abs(losses[0]), losses
