"""What the probe says is what dense models say, whatever ranks and micro-batches; the teacher is asked once."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

from kdcli.api import Data, DomainLoss, Engine, Example, Need, TeacherSignal
from kdcli.errors import ConfigError
from kdcli.objective.cross_entropy import CrossEntropy
from kdcli.store.tokens import Row, Segment
from kdcli.teacher.none import NoTeacher
from kdcli.text.tokenize import encode
from kdcli.train.distiller import Distiller
from kdcli.train.heldout import HeldOut, first_rows, hold_out
from kdcli.train.interrupt import Interrupt
from kdcli.train.probe import Probe, problem_of
from kdcli.train.scorer import Scorer, StopScoring
from tests import toys
from tests.distributed import run_ranks
from tests.text import tokenizers


def segment(name: str, number: int, *, rejected: bool = False) -> Segment:
    draw = np.random.default_rng([len(name), number, rejected])
    ids = draw.integers(0, toys.VOCAB, 4 + number % 5).astype(np.int32)
    key = f"{name}{number}{'#rejected' * rejected}"
    return Segment(ids=ids, mask=np.ones(len(ids), bool), key=key, domain=name, rejected=rejected)


def rows(name: str, count: int) -> list[Row]:
    return [Row((segment(name, number),)) for number in range(count)]


ROWS = {"code": rows("code", 5), "prose": rows("prose", 4), "law": rows("law", 2)}
BOTH = frozenset({"student", "teacher"})


class Asked(toys.ToyTeacher):
    """A teacher that gives log-probabilities too, and counts how often it is asked."""

    provides = toys.ToyTeacher.provides | Need.LOGPROBS
    times = 0

    def annotate(self, batch: Any, needs: Need) -> TeacherSignal:
        self.times += bool(needs)
        logprobs = torch.log_softmax(self.model(**batch.model_inputs()).logits, -1)
        found = super().annotate(batch, needs)
        found.logprobs = logprobs.gather(-1, batch.targets.unsqueeze(-1)).squeeze(-1).detach()
        return found


class Alone(Engine):
    """One process, or a rank of a group that is joined already; ZeRO stage 0."""

    def __init__(self, module: Any) -> None:
        self.module, self.device = module, torch.device("cpu")
        if torch.distributed.is_initialized():
            self.rank, self.world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def gather(self, value: Any) -> list[Any]:
        values: list[Any] = [value] * self.world_size
        if self.world_size > 1:
            torch.distributed.all_gather_object(values, value)
        return values

    def sum(self, values: Any) -> dict[str, float]:
        parts = self.gather(dict(values))
        return {key: math.fsum(part.get(key, 0.0) for part in parts) for key in {k for part in parts for k in part}}

    def start(self): ...
    def prepare(self, module, *, optimizer, lr_schedule, micro_size): ...
    def backward(self, loss, *, last): ...
    def step(self):
        return 0.0

    @property
    def lr(self):
        return 0.0

    def save(self, folder): ...
    def load(self, folder): ...
    def full_state_dict(self): ...


def probe(
    folder: Path,
    signals: Iterable[str] = BOTH,
    *,
    held: Any = None,
    micro_size: int = 3,
    teacher: Any = None,
    student: Any = None,
    foreign: bool = False,
) -> Probe:
    student = student or toys.ToyStudent(toys.llama(1))
    teacher = teacher or Asked(toys.llama(2, layers=3, width=24))
    distiller = Distiller(student, teacher, {"ce": CrossEntropy()}, foreign=foreign)
    engine = Alone(distiller)
    held_out = HeldOut(held or ROWS, micro_size=micro_size, pad_id=0, rank=engine.rank, world_size=engine.world_size)
    return Probe(
        held_out,
        frozenset(signals),
        distiller=distiller,
        engine=engine,
        scorer=Scorer(engine, None, Interrupt()),
        file=folder / "probe.json",
    )


def dense(model: Any, row: Row) -> tuple[torch.Tensor, torch.Tensor]:
    """log-probabilities [T - 1, V] of a row alone, and its targets."""
    ids = torch.tensor(row.segments[0].ids.astype("int64"))
    return torch.log_softmax(model(ids[None]).logits[0, :-1].detach(), -1), ids[1:]


def test_losses_and_kl_are_those_of_dense_models(tmp_path: Path) -> None:
    one = probe(tmp_path, {"student", "teacher", "kl"})
    found = one(0)
    for name, own in ROWS.items():
        nats = {"student": 0.0, "teacher": 0.0, "kl": 0.0}
        targets = 0
        for row in own:
            log_q, ids = dense(one.distiller.student.model, row)
            log_p, _ = dense(one.distiller.teacher.model, row)  # pyright: ignore[reportAttributeAccessIssue]
            nats["student"] += float(cross_entropy(log_q, ids, reduction="sum"))
            nats["teacher"] += float(cross_entropy(log_p, ids, reduction="sum"))
            nats["kl"] += float(kl_div(log_q, log_p, log_target=True, reduction="sum"))
            targets += len(ids)
        for field, total in nats.items():
            assert getattr(found[name], field) == pytest.approx(total / targets, rel=1e-5)
        assert found[name].student_per_byte is None and found[name].alignment is None


def test_the_teacher_is_asked_once_and_only_if_something_is_compared_with_it(tmp_path: Path) -> None:
    one = probe(tmp_path)
    teacher: Any = one.distiller.teacher
    first = one(0)
    assert teacher.times == 4, "eleven rows in micro-batches of three"
    assert one(2) == first
    assert teacher.times == 4
    alone = probe(tmp_path / "other", {"student"})
    assert alone(0) == {name: DomainLoss(student=loss.student) for name, loss in first.items()}
    assert alone.distiller.teacher.times == 0  # pyright: ignore[reportAttributeAccessIssue]
    assert not alone.file.exists()


def test_the_teachers_half_is_kept_with_the_run(tmp_path: Path) -> None:
    """A second attempt reads it; other rows or another source make it anew."""
    first = probe(tmp_path)(0)
    second = probe(tmp_path, teacher=Asked(toys.llama(9)))  # another would say otherwise
    assert second(0) == first
    assert second.distiller.teacher.times == 0  # pyright: ignore[reportAttributeAccessIssue]
    fewer = probe(tmp_path, held={**ROWS, "law": ROWS["law"][:1]})
    fewer(0)
    assert fewer.distiller.teacher.times > 0  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("micro_size", [1, 4, 50])
def test_micro_batches_do_not_matter(micro_size: int, tmp_path: Path) -> None:
    expected = probe(tmp_path, {"student", "teacher", "kl", "alignment"})(0)
    found = probe(tmp_path / "other", {"student", "kl", "alignment"}, micro_size=micro_size)
    found.file.parent.mkdir()
    for name, loss in found(0).items():
        for field in ("student", "teacher", "kl", "alignment"):
            assert getattr(loss, field) == pytest.approx(getattr(expected[name], field), rel=1e-4), (name, field)


def asked(folder: Path, signals: set[str]) -> dict[str, DomainLoss]:
    return probe(folder, signals)(0)


def test_two_ranks_say_what_one_says(tmp_path: Path) -> None:
    signals = {"student", "teacher", "kl", "alignment"}
    alone = probe(tmp_path, signals)(0)
    for found in run_ranks(2, asked, tmp_path, signals):
        for name, loss in found.items():
            for field in signals:
                assert getattr(loss, field) == pytest.approx(getattr(alone[name], field), rel=1e-4), (name, field)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_rows_are_dealt_once_and_ranks_score_equally_often(world_size: int) -> None:
    ranks = [HeldOut(ROWS, micro_size=3, pad_id=0, rank=rank, world_size=world_size) for rank in range(world_size)]
    batches = [list(rank.batches()) for rank in ranks]
    assert len({len(part) for part in batches}) == 1
    scored = [key for part in batches for batch in part if batch.mask.any() for key in batch.row]
    assert sorted(scored) == sorted(segment.key for own in ROWS.values() for row in own for segment in row.segments)


def test_the_worse_answer_of_a_pair_does_not_count(tmp_path: Path) -> None:
    pairs = [Row((segment("law", n), segment("law", n, rejected=True)), bundle=True) for n in range(3)]
    better = [Row(row.segments[:1]) for row in pairs]
    with_worse, without = (
        probe(tmp_path / str(n), {"student"}, held={"law": r}) for n, r in enumerate((pairs, better))
    )
    assert with_worse(0)["law"].student == pytest.approx(without(0)["law"].student, rel=1e-6)


def test_alignment_is_doges_inner_product(tmp_path: Path) -> None:
    """<g_i, sum_{j != i} g_j> / mean_j |g_j| of the mean cross-entropies, with the gradients written out."""
    one = probe(tmp_path, {"alignment"})
    model = one.distiller.student.model
    gradients = []
    for own in ROWS.values():
        losses, targets = torch.zeros(()), 0
        for row in own:
            ids = torch.tensor(row.segments[0].ids.astype("int64"))
            losses = losses + cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="sum")
            targets += len(ids) - 1
        gradient = torch.autograd.grad(losses / targets, list(model.parameters()))
        gradients.append(torch.cat([g.flatten() for g in gradient]))
    g = torch.stack(gradients).double()
    expected = g @ g.sum(0) - (g * g).sum(1)
    expected /= g.norm(dim=1).mean()
    found = [loss.alignment for loss in one(0).values()]
    assert found == pytest.approx(expected.tolist(), rel=1e-4)
    assert all(p.grad is None for p in model.parameters())
    assert model.training


def test_a_domain_alone_is_aligned_with_nothing(tmp_path: Path) -> None:
    assert probe(tmp_path, {"alignment"}, held={"law": ROWS["law"]})(0)["law"].alignment == 0.0


class Answers(Data):
    def domains(self) -> dict[str, Iterable[Example]]:
        texts = ["the cat sat on a mat", "naïve café, 日本", "and 2 + 2 = 4"]
        return {"all": [Example(prompt="Say it: ", response=text, domain="all") for text in texts]}

    def fingerprint(self) -> str:
        return "answers"


class Foreign(NoTeacher):
    """Two nats for each token of its own."""

    provides = Need.LOGPROBS

    def annotate(self, batch: Any, needs: Need) -> TeacherSignal:
        assert needs == Need.LOGPROBS
        return TeacherSignal(own_logprobs=torch.where(batch.teacher.mask, -2.0, 0.0))


def test_with_another_tokenizer_nats_are_per_byte_of_the_same_text(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("KDCLI_CACHE", str(tmp_path))
    own, other = tokenizers.byte_level(), tokenizers.shipped()
    held, _ = encode(Answers(), own, max_length=128, teacher_tokenizer=other)
    model = toys.llama(1, vocab=len(own))
    student = toys.ToyStudent(model)
    student.tokenizer = own
    found = probe(tmp_path, BOTH, held=held, teacher=Foreign(), student=student, foreign=True)(0)["all"]
    texts = [example.response or "" for example in Answers().domains()["all"]]
    size = sum(len(text.encode()) for text in texts)
    tokens = sum(1 + len(other(text, add_special_tokens=False)["input_ids"]) for text in texts)  # one ends the answer
    assert found.teacher_per_byte == pytest.approx(2 * tokens / size)
    assert found.teacher is None
    nats = 0.0
    for row in held["all"]:
        log_q, ids = dense(model, row)
        nats += float(cross_entropy(log_q, ids, reduction="none")[torch.tensor(row.segments[0].mask[1:])].sum())
    assert found.student_per_byte == pytest.approx(nats / size, rel=1e-5)


def test_a_signal_stops_it_and_leaves_no_trace(tmp_path: Path) -> None:
    one = probe(tmp_path)
    one.scorer.interrupt.received = 15
    with pytest.raises(StopScoring):
        one(0)
    assert one.teacher is None and not one.file.exists()
    assert one.distiller.training


def test_the_last_rows_are_held_out_at_most_a_tenth_at_least_one() -> None:
    rows_of = {"large": rows("large", 40), "small": rows("small", 3)}
    for count, large in ((500, 4), (2, 2)):
        training, held = hold_out(rows_of, count)
        assert [row.segments[0].key for row in held["large"]] == [f"large{n}" for n in range(40 - large, 40)]
        assert [row.segments[0].key for row in held["small"]] == ["small2"]
        for name, whole in rows_of.items():
            assert [*training[name], *held[name]] == whole
            assert training[name][:] + held[name][:] == whole
    with pytest.raises(ConfigError, match=r"domain lone has 1 row.*probe.data"):
        hold_out({**rows_of, "lone": rows("lone", 1)}, 500)


def test_a_domain_without_held_out_rows_is_named() -> None:
    assert {name: len(part) for name, part in first_rows(ROWS, 2, ["law", "code"]).items()} == {"law": 2, "code": 2}
    with pytest.raises(ConfigError, match=r"domain music has no held-out rows: probe.data has code, prose, law"):
        first_rows(ROWS, 2, ["code", "music"])


def test_held_out_rows_without_a_target_are_refused(tmp_path: Path) -> None:
    blank = Segment(ids=np.arange(3, dtype=np.int32), mask=np.zeros(3, bool), key="blank", domain="law")
    with pytest.raises(ConfigError, match="domain law have no targets"):
        probe(tmp_path, {"student"}, held={**ROWS, "law": [Row((blank,))]})(0)


def test_what_a_teacher_cannot_say_is_refused_in_words() -> None:
    teacher = Asked(toys.llama(2))
    assert problem_of(BOTH | {"kl"}, teacher) is None
    assert problem_of(frozenset({"student", "trained"}), NoTeacher()) is None
    assert "teacher's logprobs, which NoTeacher does not provide; set teacher=hf" in str(problem_of(BOTH, NoTeacher()))
    assert "one tokenizer" in str(problem_of(frozenset({"kl"}), teacher, foreign=True))
