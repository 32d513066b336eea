"""Objectives on layers: zero for equal models, values worked out by hand, layers by name, what is learned and kept."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kdcli.api import Batch, ModelShape, Need, Objective, Relations, StudentOutput, TeacherSignal, TeacherView, Unit
from kdcli.errors import ConfigError
from kdcli.objective._layers import Layered
from kdcli.objective.attention import Attention
from kdcli.objective.cka import CKA
from kdcli.objective.hidden_cosine import HiddenCosine
from kdcli.objective.hidden_mse import HiddenMSE
from kdcli.objective.minilm import MiniLM
from kdcli.objective.rkd import RKD, spaced
from kdcli.objective.ted import TED
from kdcli.ops.head import Head
from kdcli.student.hf import HFStudent
from kdcli.teacher.hf import HFTeacher
from kdcli.teacher.none import NoTeacher
from kdcli.train.conformance import oracles_features, records
from kdcli.train.distiller import Distiller
from kdcli.train.export import export
from tests import families, toys

CPU = torch.device("cpu")
S = ModelShape(layers=2, width=8, heads=2, kv_heads=1, head_width=4, vocab_size=17)
T = ModelShape(layers=4, width=16, heads=4, kv_heads=2, head_width=4, vocab_size=17)
SAME: list[Callable[[], Layered]] = [
    HiddenMSE,
    lambda: HiddenMSE(normalize="teacher"),
    lambda: HiddenMSE(normalize="unit"),
    HiddenCosine,
    Attention,
    lambda: Attention(distance="kl"),
    MiniLM,
    lambda: MiniLM(layers="uniform", heads=4),
    RKD,
    CKA,
    lambda: CKA(unbiased=True),
]
OTHER: list[Callable[[], Layered]] = [*SAME, TED]


def drawn(shape: ModelShape, batch: Batch, generator: torch.Generator) -> dict[str, Any]:
    """Random layers of a model, float64 and under the padding too, and a float32 head as in a run."""
    b, t = batch.mask.shape

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    attention = draw(shape.layers, b, shape.heads, t, t).softmax(-1).tril()
    heads = {"queries": shape.heads, "keys": shape.kv_heads, "values": shape.kv_heads}
    return {
        "hidden_states": tuple(draw(shape.layers + 1, b, t, shape.width)),
        "attentions": tuple(attention),
        "relations": tuple(
            Relations(**{name: draw(b, t, count, shape.head_width) for name, count in heads.items()})
            for _ in range(shape.layers)
        ),
        "head": Head(weight=draw(20, shape.width).float(), bias=draw(20).float(), vocab_size=shape.vocab_size),
    }


def case(seed: int = 0, student: ModelShape = S, teacher: ModelShape = T) -> tuple[Batch, StudentOutput, TeacherSignal]:
    batch, generator = toys.batch(seed, vocab=17), torch.Generator().manual_seed(seed)
    ours, theirs = drawn(student, batch, generator), drawn(teacher, batch, generator)
    return batch, StudentOutput(**ours), TeacherSignal(**theirs)


def kept(objective: Objective, batch: Batch) -> Tensor:
    units = objective.units(batch)
    return units & batch.mask if objective.unit is Unit.TOKEN else units


def by_oracle(objective: Objective, at: tuple[Batch, StudentOutput, TeacherSignal], **settings: Any) -> Tensor:
    name = type(objective).__module__.rpartition(".")[2]
    oracle = getattr(oracles_features, name)
    if name in ("hidden_mse", "hidden_cosine", "ted"):
        settings["parameters"] = {n: p.detach().double().numpy() for n, p in objective.named_parameters()}
    with np.errstate(all="ignore"):
        return torch.as_tensor(oracle(*map(records.plain, at), **settings))


# ------------------------------------------------------------------------------------------- properties, real models


def pair(tmp_path: Path, family: str, student: str | None = None, **changes: Any) -> tuple[HFStudent, HFTeacher]:
    teacher = HFTeacher(path=families.folder(tmp_path / "teacher", family), dtype="float32", attention="eager")
    path = families.folder(tmp_path / "student", student or family, **changes)
    one = HFStudent(path=path, attention="eager", tokenizer=teacher.path)
    teacher.load(CPU)
    one.load(CPU)
    return one, teacher


def step(
    student: HFStudent, teacher: HFTeacher, objective: Objective, *batches: Batch
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of one optimizer step."""
    distiller = Distiller(student, teacher, {"it": objective})
    distiller.zero_grad()
    counts = {"it": 0.0, "tokens": 0.0}
    for batch in batches:
        counts = {name: counts[name] + value for name, value in distiller.count(batch).items()}
    total = 0.0
    for batch in batches:
        loss, _ = distiller(batch, counts)
        loss.backward()
        total += float(loss.detach())
    return total, {n: p.grad for n, p in distiller.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("make", SAME)
def test_a_copy_of_the_teacher_has_nothing_to_learn(make: Callable[[], Layered], family: str, tmp_path: Path) -> None:
    student, teacher = pair(tmp_path, family)
    loss, gradients = step(student, teacher, make(), toys.batch(vocab=40))
    assert loss == pytest.approx(0.0, abs=1e-5)
    assert max(float(g.abs().max()) for g in gradients.values()) < 1e-3


@pytest.mark.parametrize("make", OTHER)
def test_how_a_step_is_cut_does_not_matter(make: Callable[[], Layered], tmp_path: Path) -> None:
    """Rows apart, together and packed, through grouped heads, another family of teacher and a sliding window."""
    student, teacher = pair(tmp_path, "gpt2", "mistral", num_hidden_layers=2, hidden_size=16, head_dim=4)
    batch = toys.batch(vocab=40)
    whole = step(student, teacher, make(), batch)
    assert whole[0] > 1e-3
    assert any(float(g.abs().max()) > 0 for g in whole[1].values())
    for cut in ([toys.rows_of(batch, i, i + 1) for i in range(4)], [records.packed(batch)]):
        loss, gradients = step(student, teacher, make(), *cut)
        assert loss == pytest.approx(whole[0], rel=1e-4)
        assert gradients.keys() == whole[1].keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, whole[1][name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("make", OTHER)
def test_gradients_are_the_slopes(make: Callable[[], Layered]) -> None:
    """Of every number that the student's layers and the objective's own parameters hold, along random directions."""
    batch, student, teacher = case()
    objective = make()
    objective.fit(S, T)
    objective.double()
    filters = isinstance(objective, TED)  # in its first stage it holds the student fixed
    leaves = dict(objective.named_parameters()) | ({} if filters else records.numbers(replace(student, head=None)))
    for leaf in leaves.values():
        leaf.requires_grad_()

    def total() -> Tensor:
        return objective(batch, student, teacher)[kept(objective, batch)].double().sum()

    gradients = torch.autograd.grad(total(), list(leaves.values()), allow_unused=True)
    used = [(leaf, g) for leaf, g in zip(leaves.values(), gradients, strict=True) if g is not None and g.any()]
    assert used
    generator, h = torch.Generator().manual_seed(3), 1e-3 if filters else 1e-6  # its log-probabilities are float32
    for leaf, gradient in used:
        direction = torch.randn(leaf.shape, generator=generator, dtype=torch.float64)
        if objective.needs is Need.ATTENTION:
            direction *= leaf.detach()
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                leaf += sign * h * direction
                ends.append(float(total()))
                leaf -= sign * h * direction
        slope = float((gradient * direction).sum())
        assert (ends[0] - ends[1]) / (2 * h) == pytest.approx(slope, rel=1e-2 if filters else 1e-4, abs=1e-5)


@pytest.mark.parametrize("make", OTHER)
def test_nothing_supervised_is_zero_with_a_graph(make: Callable[[], Layered], tmp_path: Path) -> None:
    student, teacher = pair(tmp_path, "llama")
    batch = toys.batch(vocab=40)
    loss, gradients = step(student, teacher, make(), replace(batch, mask=torch.zeros_like(batch.mask)))
    assert loss == 0.0
    assert gradients
    assert not any(g.any() for g in gradients.values())


@pytest.mark.parametrize("make", OTHER)
def test_padding_may_hold_anything(make: Callable[[], Layered]) -> None:
    batch, student, teacher = case()
    objective = make()
    objective.fit(S, T)
    expected = objective(batch, student, teacher)[kept(objective, batch)]
    outside = ~batch.attention_mask

    def spoilt(path: str, values: Tensor) -> Tensor:
        if path.startswith("attentions"):
            values = values.masked_fill(outside[:, None, :, None], math.nan)
            return values.masked_fill(outside[:, None, None, :], math.nan)
        if path.startswith("head"):
            return values
        return values.masked_fill(outside.view(*outside.shape, *[1] * (values.dim() - 2)), math.nan)

    student = records.mapped(student, lambda path, v: spoilt(path, v).requires_grad_())
    values = objective(batch, student, records.mapped(teacher, spoilt))[kept(objective, batch)]
    assert torch.equal(values, expected)
    values.double().sum().backward()
    assert all(torch.isfinite(v.grad).all() for v in records.numbers(student).values() if v.grad is not None)


@pytest.mark.parametrize("make", OTHER)
def test_targets_that_the_teacher_does_not_score_are_no_units(make: Callable[[], Layered]) -> None:
    batch, student, teacher = case()
    if make().needs & (Need.ATTENTION | Need.RELATIONS):
        pytest.skip("refused by the teacher")
    objective = make()
    objective.fit(S, T)
    position = torch.arange(12).expand(4, 12).masked_fill(~batch.mask, -1).clone()
    position[0] = -1
    position[1, 5] = -1
    view = TeacherView(input_ids=batch.input_ids, attention_mask=batch.attention_mask, position=position)
    seen = replace(batch, teacher=view)
    units = kept(objective, seen)
    assert not units[0].any()
    less = replace(batch, mask=batch.mask & (position >= 0))
    assert torch.equal(units, kept(objective, less))
    found, expected = objective(seen, student, teacher), objective(less, student, teacher)
    torch.testing.assert_close(found[units], expected[units])


def test_the_worse_answer_of_a_pair_is_no_example() -> None:
    batch = replace(toys.batch(vocab=17), rejected=torch.tensor([False, True, False, True]))
    assert RKD().units(batch).tolist() == [True, False, True, False]
    assert not HiddenMSE().units(batch)[batch.segment == 1].any()


# ----------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (HiddenMSE, {"layers": [[0, 0], [2, 3]], "normalize": "none"}),
        (HiddenMSE, {"layers": "last", "normalize": "teacher"}),
        (HiddenCosine, {"layers": [[1, 4], [1, 2]]}),
        (Attention, {"layers": [[2, 1]], "distance": "mse"}),
        (Attention, {"layers": "last", "distance": "kl"}),
        (MiniLM, {"layers": [[1, 2], [2, 3]], "relations": ["values"], "heads": None}),
        (MiniLM, {"layers": "uniform", "relations": ["keys", "queries"], "heads": 4}),
        (RKD, {"layers": [[0, 1]], "distance_weight": 1.0, "angle_weight": 0.5, "points": 5}),
        (RKD, {"layers": "uniform", "distance_weight": 0.0, "angle_weight": 1.0, "points": 32}),
        (CKA, {"layers": [[0, 4]], "unbiased": True}),
        (TED, {"layers": [[1, 4]], "stage": "filters"}),
    ],
)
def test_equals_the_second_formula_for_layers_of_ones_choice(kind: Any, settings: dict[str, Any]) -> None:
    objective, at = kind(**settings), case(seed=4)
    objective.fit(S, T)
    found, expected = objective(*at), by_oracle(objective, at, **settings)
    units = kept(objective, at[0])
    assert units.any()
    torch.testing.assert_close(found[units].double(), expected[units], rtol=1e-4, atol=1e-5)


def test_uniform_layers_end_with_the_last() -> None:
    assert HiddenMSE().pairs(2, 4) == [(1, 2), (2, 4)]
    assert HiddenMSE().pairs(4, 6) == [(1, 2), (2, 3), (3, 5), (4, 6)]
    assert HiddenMSE().pairs(4, 1) == [(i, 1) for i in (1, 2, 3, 4)]
    assert HiddenMSE(layers="last").pairs(4, 6) == [(4, 6)]


def one_row(student: Any, teacher: Any) -> tuple[Batch, StudentOutput, TeacherSignal]:
    """All positions of one sequence supervised, with these states [T, D] as the only layer."""
    count = len(student)
    batch = replace(toys.batch(rows=1, length=count, vocab=17))
    batch.mask.fill_(True)
    states = [tuple(torch.as_tensor(x, dtype=torch.float64)[None] for _ in range(2)) for x in (student, teacher)]
    return batch, StudentOutput(hidden_states=states[0]), TeacherSignal(hidden_states=states[1])


def test_distances_by_hand() -> None:
    """(3, 4) against (0, 0.5): squares 9 and 12.25, mean 10.625; of the teacher 0.125; unit: (0.6, 0.8) against
    (0, 1) is 0.36 + 0.04. The cosine is 0.8."""
    at = one_row([[3.0, 4.0]], [[0.0, 0.5]])
    assert float(HiddenMSE()(*at)) == pytest.approx(10.625)
    assert float(HiddenMSE(normalize="teacher")(*at)) == pytest.approx(85.0)
    assert float(HiddenMSE(normalize="unit")(*at)) == pytest.approx(0.4)
    assert float(HiddenCosine()(*at)) == pytest.approx(0.2)


def test_attention_by_hand() -> None:
    """The second of two positions attends (1/2, 1/2) or (1/4, 3/4): squares 1/16 each, and KL(teacher || student) =
    1/2 log(4/3); to the third it attends nothing, whatever stands there."""
    batch = one_row([[0.0]] * 3, [[0.0]] * 3)[0]
    ours, theirs = (torch.tensor([[1.0, 9.0, 9.0], [p, 1 - p, 9.0], [0.0, 0.0, 1.0]])[None, None] for p in (0.25, 0.5))
    at = batch, StudentOutput(attentions=(ours,)), TeacherSignal(attentions=(theirs,))
    torch.testing.assert_close(Attention()(*at), torch.tensor([[0.0, 1 / 16, 0.0]]))
    torch.testing.assert_close(Attention(distance="kl")(*at), torch.tensor([[0.0, 0.5 * math.log(4 / 3), 0.0]]))
    both = torch.cat([theirs, 2 * ours - theirs], dim=1)  # two heads whose mean is the student's
    at = batch, StudentOutput(attentions=(ours,)), TeacherSignal(attentions=(both,))
    assert float(Attention()(*at).abs().max()) == 0.0


def test_relations_by_hand() -> None:
    """Values (1) and (2), one relation head: at the second position scores 2 and 4. The teacher's are equal, so half
    and half: KL = log 1/2 - 1/2 (log q_1 + log q_2), with log q = (-2, 0) - log(1 + e^-2)."""
    batch = one_row([[0.0]] * 2, [[0.0]] * 2)[0]

    def relations(values: list[float]) -> Relations:
        vectors = torch.tensor(values)[None, :, None, None]
        return Relations(queries=vectors, keys=vectors, values=vectors)

    at = batch, StudentOutput(relations=(relations([1, 2]),)), TeacherSignal(relations=(relations([3, 3]),))
    expected = math.log(0.5) + 1 + math.log(1 + math.exp(-2))
    for kinds in (["values"], ["queries", "keys", "values"]):
        torch.testing.assert_close(MiniLM(relations=kinds)(*at), torch.tensor([[0.0, expected]]))  # type: ignore[arg-type]


def test_rkd_by_hand() -> None:
    """Three points on a line at 0, 1, 2 against an equilateral triangle: distances (1, 1, 2) / (4/3) against 1, so
    1/2 (2 (1/4)^2 + (1/2)^2) / 3 = 1/16; cosines 1, -1, 1 against 1/2, so (1/8 + 1 + 1/8) / 3 = 5/12."""
    line, triangle = [[0.0, 0], [1, 0], [2, 0]], [[0.0, 0], [1, 0], [0.5, math.sqrt(0.75)]]
    at = one_row(line, triangle)
    assert float(RKD(distance_weight=1.0, angle_weight=0.0)(*at)) == pytest.approx(1 / 16)
    assert float(RKD(distance_weight=0.0, angle_weight=1.0)(*at)) == pytest.approx(5 / 12)
    assert float(RKD()(*at)) == pytest.approx(25 / 16 + 50 * 5 / 12)


def test_rkd_knows_no_rotation_and_no_size_but_cares_for_the_points() -> None:
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(9, 5, generator=generator, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64))[0]
    assert float(RKD()(*one_row(3 * points @ turn + 1, points))) == pytest.approx(0.0, abs=1e-9)
    mixed = points.clone()
    mixed[[1, 2]] = mixed[[2, 1]]
    assert float(RKD()(*one_row(mixed, points))) > 0.1
    assert float(RKD(points=3)(*one_row(mixed, points))) == pytest.approx(0.0, abs=1e-9)  # the first, 5th and last
    assert spaced(9, 3).tolist() == [0, 4, 8]
    assert spaced(3, 32).tolist() == [0, 1, 2]


def test_equal_points_have_a_finite_gradient() -> None:
    batch, student, teacher = one_row([[1.0, 2.0]] * 4, [[0.0, 1], [1, 0], [2, 2], [0, 0]])
    assert student.hidden_states is not None
    for kind in (RKD, CKA):
        leaf = student.hidden_states[1].clone().requires_grad_()
        value = kind(layers="last")(batch, replace(student, hidden_states=(leaf, leaf)), teacher)
        value.sum().backward()
        assert leaf.grad is not None
        assert torch.isfinite(value).all()
        assert torch.isfinite(leaf.grad).all()


@pytest.mark.parametrize("unbiased", [False, True])
def test_cka_knows_no_rotation_size_or_place(unbiased: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(30, 5, generator=generator, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64))[0]
    objective = CKA(layers="last", unbiased=unbiased)
    assert float(objective(*one_row(3 * points @ turn + 1, points))) == pytest.approx(0.0, abs=1e-9)
    wide = torch.randn(30, 40, generator=generator, dtype=torch.float64)  # more features than targets: the Gram form
    assert float(objective(*one_row(wide, 2 * wide - 5))) == pytest.approx(0.0, abs=1e-9)


def test_cka_by_hand() -> None:
    """One feature each: 1 - the square of their correlation. (0, 1, 2, 3) and (0, 1, 1, 0) do not correlate."""
    objective = CKA(layers="last")
    line = [[0.0], [1.0], [2.0], [3.0]]
    assert float(objective(*one_row(line, [[0.0], [1.0], [1.0], [0.0]]))) == pytest.approx(1.0)
    other = [[0.0], [2.0], [1.0], [3.0]]
    correlation = float(np.corrcoef(np.ravel(line), np.ravel(other))[0, 1])
    assert float(objective(*one_row(line, other))) == pytest.approx(1 - correlation**2)


def test_unbiased_alignment_of_unrelated_states_is_none() -> None:
    """In the mean of 200 pairs of random states, 12 targets by 30: near 0, where the biased one is near 1."""
    generator = torch.Generator().manual_seed(0)
    values = {True: [], False: []}
    for _ in range(200):
        at = one_row(*torch.randn(2, 12, 30, generator=generator, dtype=torch.float64))
        for unbiased, found in values.items():
            found.append(float(CKA(layers="last", unbiased=unbiased)(*at)))
    assert np.mean(values[True]) == pytest.approx(1.0, abs=0.02)
    assert np.mean(values[False]) < 0.4


def test_short_sequences_are_no_units() -> None:
    batch, student, teacher = case()
    batch.mask[0] = False
    batch.mask[1] = False
    batch.mask[0, 3:5] = True
    batch.mask[1, 3:6] = True
    for objective, units in ((RKD(), [False, True, True, True]), (CKA(), [False, False, True, True])):
        objective.fit(S, T)
        assert objective.units(batch).tolist() == units
        assert torch.isfinite(objective(batch, student, teacher)).all()


# ------------------------------------------------------------------------------------------------------- bad settings


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HiddenMSE(layers=[(3, 4)]), r"no student layer 3; it has 2 \(0 is the embedding\)"),
        (lambda: HiddenCosine(layers=[(0, 0), (2, 5)]), r"no teacher layer 5; it has 4 \(0 is the embedding\)"),
        (lambda: CKA(layers=[(-1, 4)]), r"no student layer -1; it has 2"),
        (lambda: Attention(layers=[(0, 1)]), r"no student layer 0; it has 2 \(1 is the first\)"),
        (lambda: MiniLM(layers=[(1, 0)]), r"no teacher layer 0; it has 4 \(1 is the first\)"),
        (lambda: MiniLM(heads=8), r"heads is 8, .* the 4 numbers of the student's keys; set a divisor of 4, or null"),
        (lambda: RKD(layers=[(9, 1)]), r"RKD: there is no student layer 9"),
        (lambda: TED(layers=[(1, 9)]), r"TED: there is no teacher layer 9"),
    ],
)
def test_what_the_models_do_not_have_is_named(make: Callable[[], Layered], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make().fit(S, T)


@pytest.mark.parametrize("make", OTHER)
def test_a_teacher_without_layers_is_refused(make: Callable[[], Layered]) -> None:
    with pytest.raises(ConfigError, match="compares layers, and this teacher has none; set teacher=hf"):
        make().fit(S, NoTeacher().shape())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HiddenMSE(layers=[]), "layers is empty"),
        (lambda: MiniLM(relations=[]), "name queries, keys or values"),
        (lambda: MiniLM(relations=["keys", "keys"]), "each once"),
        (lambda: MiniLM(heads=0), "set a number above 0, or null"),
        (lambda: RKD(points=2), "set at least 3"),
        (lambda: TED(stage="distill"), "train stage=filters first"),
    ],
)
def test_impossible_settings_are_refused(make: Callable[[], Layered], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


# ----------------------------------------------------------------------------------------- what is learned, and kept


@pytest.mark.parametrize("kind", [HiddenMSE, HiddenCosine])
def test_states_of_other_widths_get_a_map_each(kind: Any) -> None:
    same, auto, always, again = kind(), kind(), kind(project="always"), kind()
    same.fit(S, replace(T, width=S.width))
    auto.fit(S, T)
    again.fit(S, T)
    always.fit(S, replace(T, width=S.width))
    assert list(same.parameters()) == []
    assert {n: tuple(p.shape) for n, p in auto.named_parameters()} == {
        "projector.1_2": (16, 8),
        "projector.2_4": (16, 8),
    }
    assert [tuple(p.shape) for p in always.parameters()] == [(8, 8)] * 2
    assert (same.zero_at_teacher, always.zero_at_teacher) == (True, False)
    weight = auto.projector["1_2"]
    assert torch.equal(weight, again.projector["1_2"])
    assert not torch.equal(weight, auto.projector["2_4"])
    assert 0.8 < float(weight.detach().abs().max()) / math.sqrt(6 / 24) <= 1  # Xavier's bound
    other = kind(seed=1)
    other.fit(S, T)
    assert not torch.equal(weight, other.projector["1_2"])


class Alone:
    """What `export` asks of an engine, for one process."""

    rank = 0

    def whole(self, parameters: Any) -> Any:
        return nullcontext()

    def gather(self, value: Any) -> list[Any]:
        return [value]


def trained(
    tmp_path: Path, run: str, objectives: dict[str, Objective], steps: int = 20
) -> tuple[Distiller, list[float], Path]:
    """A student half as wide and deep as its teacher, after some steps; the loss of each; and the run's folder."""
    student, teacher = pair(tmp_path / run, "llama", num_hidden_layers=2, hidden_size=16, head_dim=4)
    distiller, batch = Distiller(student, teacher, objectives), toys.batch(vocab=40)
    optimizer, losses = torch.optim.Adam([p for p in distiller.parameters() if p.requires_grad], lr=0.01), []
    for _ in range(steps):
        loss, _ = distiller(batch, distiller.count(batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    folder = tmp_path / run / "run"
    folder.mkdir()
    export(distiller, Alone(), folder, {}, {})  # type: ignore[arg-type]
    return distiller, losses, folder


def test_a_projector_is_trained_saved_and_taken_up_again(tmp_path: Path) -> None:
    objective, plain = HiddenMSE(layers="last"), HiddenCosine(layers="last")
    begin = HiddenMSE(layers="last")
    _, losses, run = trained(tmp_path, "one", {"mse": objective, "cos": plain, "rkd": RKD()})
    assert losses[-1] < 0.9 * losses[0]
    assert sorted(file.name for file in (run / "objectives").iterdir()) == ["cos.safetensors", "mse.safetensors"]
    saved = load_file(run / "objectives" / "mse.safetensors")
    assert saved.keys() == {"projector.2_4"}
    assert torch.equal(saved["projector.2_4"], objective.projector["2_4"])
    shapes = replace(S, width=16), replace(T, width=32)
    begin.fit(*shapes)
    assert not torch.allclose(begin.projector["2_4"], saved["projector.2_4"])
    again = HiddenMSE(layers="last", init=str(run / "objectives" / "mse.safetensors"))
    again.fit(*shapes)
    assert torch.equal(again.projector["2_4"], saved["projector.2_4"])
    with pytest.raises(ConfigError, match=r"HiddenMSE: init: .* several that fit \(cos\.safetensors, mse\.safetensors"):
        HiddenMSE(layers="last", init=str(run)).fit(*shapes)
    with pytest.raises(ConfigError, match=r"has no projector\.1_2; it has projector\.2_4"):
        HiddenMSE(layers=[(1, 2)], init=str(run)).fit(*shapes)
    square = HiddenMSE(layers="last", project="always", init=again.init)
    with pytest.raises(ConfigError, match=r"projector\.2_4 is \(32, 16\), but these models need \(16, 16\)"):
        square.fit(replace(S, width=16), replace(T, width=16))
    with pytest.raises(ConfigError, match="neither a run with objectives"):
        HiddenMSE(layers="last", init=str(tmp_path / "nowhere")).fit(*shapes)
    (run / "objectives" / "cos.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ConfigError, match="cannot be read"):
        HiddenMSE(layers="last", init=str(run)).fit(*shapes)


def test_nothing_learned_leaves_no_folder(tmp_path: Path) -> None:
    _, losses, run = trained(tmp_path, "one", {"rkd": RKD(), "cka": CKA(unbiased=True), "rel": MiniLM()})
    assert losses[-1] < 0.9 * losses[0]
    assert [path.name for path in run.iterdir()] == ["student"]


def test_ted_learns_filters_then_the_student_through_them(tmp_path: Path) -> None:
    """The first run changes filters alone and lowers their loss; the second holds the teacher's, and lowers its."""
    first = TED(layers=[(1, 2), (2, 4)])
    distiller, losses, run = trained(tmp_path, "one", {"ted": first})
    assert losses[-1] < 0.9 * losses[0]
    untouched = families.model("llama", num_hidden_layers=2, hidden_size=16, head_dim=4).state_dict()
    assert all(torch.equal(v, untouched[n]) for n, v in distiller.student.model.state_dict().items())
    saved = load_file(run / "objectives" / "ted.safetensors")
    assert saved.keys() == {f"{who}.{key}" for who in ("student", "teacher") for key in ("1_2", "2_4")}
    second = TED(layers=[(1, 2), (2, 4)], stage="distill", filters=str(run))
    _, losses, _ = trained(tmp_path, "two", {"ted": second})
    assert losses[-1] < 0.9 * losses[0]
    assert torch.equal(second.teacher["1_2"], saved["teacher.1_2"])
    assert not torch.equal(second.student["1_2"], saved["student.1_2"])


def test_ted_distils_what_the_second_formula_says(tmp_path: Path) -> None:
    _, _, run = trained(tmp_path, "one", {"ted": TED(layers=[(1, 2), (2, 4)])}, steps=2)
    objective = TED(layers=[(1, 2), (2, 4)], stage="distill", filters=str(run))
    shapes = replace(S, width=16), replace(T, width=32)
    objective.fit(*shapes)
    at = case(2, *shapes)
    expected = by_oracle(objective, at, layers=[(1, 2), (2, 4)], stage="distill")
    mask = at[0].mask
    torch.testing.assert_close(objective(*at)[mask], expected[mask])
    assert Need.LOGITS not in objective.needs


def test_ted_leaves_out_ids_that_the_teacher_does_not_know() -> None:
    batch, student, teacher = case()
    batch.targets[0, 3] = 18
    objective = TED()
    objective.fit(S, T)
    assert not objective.units(batch)[0, 3]
    assert torch.isfinite(objective(batch, student, teacher)[kept(objective, batch)]).all()
