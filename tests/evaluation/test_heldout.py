"""Held-out numbers: equal to a plain computation, whatever the micro-batches and ranks."""

import math
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

from kdcli.api import Batch, Data, Example, Scores
from kdcli.errors import ConfigError
from kdcli.evaluation.heldout import Heldout
from kdcli.teacher.none import NoTeacher
from kdcli.text.tokenize import encode
from kdcli.train.distiller import Distiller
from tests import families, toys

TOKENIZER = families.tokenizer()
REAL = len(families.WORDS)


class Words(Data):
    """Documents of random words, the same for the same seed."""

    max_bad_fraction = 0.0

    def __init__(self, **sizes: int) -> None:
        self.sizes = sizes

    def domains(self) -> dict[str, Iterable[Example]]:
        return {name: self._documents(name, size) for name, size in self.sizes.items()}

    def bad_rows(self) -> dict[str, str]:
        return {}

    def fingerprint(self) -> str:
        return repr(self.sizes)

    def _documents(self, name: str, size: int) -> list[Example]:
        draw = random.Random(name)
        texts = [" ".join(f"w{draw.randrange(38)}" for _ in range(draw.randint(3, 20))) for _ in range(size)]
        return [Example(text=text, domain=name) for text in texts]


class Scorer:
    """A subject: one rank of `world_size`. Adding up over ranks is the test's `total`, or this rank's own values."""

    tokenizer = TOKENIZER
    reading: ClassVar[dict[str, Any]] = {}

    def __init__(self, teacher: Any = None, rank: int = 0, world_size: int = 1, total: Any = None) -> None:
        student = toys.ToyStudent(families.model("llama", seed=1), REAL)
        self.distiller = Distiller(
            student, teacher or toys.ToyTeacher(families.model("llama", seed=2), REAL), {}
        ).eval()
        self.rank, self.world_size, self.total = rank, world_size, total
        self.calls, self.summed = 0, {}

    def score(self, batch: Batch) -> Scores:
        self.calls += 1
        return self.distiller(batch, mode="score")

    def sum(self, values: Mapping[str, float]) -> dict[str, float]:
        self.summed = dict(values)
        return dict(values) if self.total is None else self.total


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDCLI_CACHE", str(tmp_path))


def _reference(rows: list[Any]) -> dict[str, float]:
    """Every row alone, dense logits, torch's own losses."""
    models = [families.model("llama", seed=seed) for seed in (1, 2)]
    nll = teacher_nll = kl = agree = tokens = 0.0
    for row in rows:
        ids = torch.tensor(row.segments[0].ids.astype("int64"))
        log_q, log_p = (families.logits(m, ids[None])[0, :-1, :REAL].log_softmax(-1) for m in models)
        tokens += len(ids) - 1
        nll += float(cross_entropy(log_q, ids[1:], reduction="sum"))
        teacher_nll += float(cross_entropy(log_p, ids[1:], reduction="sum"))
        kl += float(kl_div(log_q, log_p, log_target=True, reduction="sum"))
        agree += float((log_q.argmax(-1) == log_p.argmax(-1)).sum())
    sums = {"ppl": math.exp(nll / tokens), "teacher_ppl": math.exp(teacher_nll / tokens)}
    return sums | {"kl": kl / tokens, "agree": agree / tokens, "tokens": tokens}


def test_numbers_equal_a_plain_computation() -> None:
    data = Words(prose=9, code=5)
    metrics = Heldout(data=data, rows=6, max_length=10, micro_size=4)(Scorer(), 0)
    rows, _ = encode(data, TOKENIZER, max_length=10)
    expected = {name: _reference(list(rows[name])[:6]) for name in ("prose", "code")}
    expected["all"] = _reference(list(rows["prose"])[:6] + list(rows["code"])[:6])
    assert metrics == pytest.approx({f"{n}/{k}": v for n, d in expected.items() for k, v in d.items()}, rel=1e-4)


@pytest.mark.parametrize("micro_size", [1, 3, 50])
def test_micro_batches_do_not_matter(micro_size: int) -> None:
    one, other = (
        Heldout(data=Words(a=7, b=2), max_length=12, micro_size=size)(Scorer(), 0) for size in (4, micro_size)
    )
    assert one == pytest.approx(other, rel=1e-5)


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_ranks_do_not_matter_and_call_equally_often(world_size: int) -> None:
    """More ranks than micro-batches included; the sums are exactly those of one rank."""
    heldout = Heldout(data=Words(a=7, b=2, c=1), rows=5, max_length=12, micro_size=2)
    single = Scorer()
    alone = heldout(single, 0)
    ranks = [Scorer(rank=rank, world_size=world_size, total=single.summed) for rank in range(world_size)]
    for rank in ranks:
        heldout(rank, 0)
    assert len({rank.calls for rank in ranks}) == 1
    assert len({tuple(rank.summed) for rank in ranks}) == 1
    total = {key: math.fsum(rank.summed[key] for rank in ranks) for key in ranks[0].summed}
    assert heldout(Scorer(world_size=world_size, total=total), 0) == pytest.approx(alone, rel=1e-12)


def test_a_perfect_student_agrees_with_its_teacher() -> None:
    teacher = toys.ToyTeacher(families.model("llama", seed=1), REAL)
    metrics = Heldout(data=Words(a=5))(Scorer(teacher), 0)
    assert metrics["all/kl"] == pytest.approx(0, abs=1e-6)
    assert metrics["all/agree"] == 1
    assert metrics["all/ppl"] == pytest.approx(metrics["all/teacher_ppl"], rel=1e-6)


def test_without_a_teacher_there_is_perplexity_alone() -> None:
    metrics = Heldout(data=Words(a=5))(Scorer(NoTeacher()), 0)
    assert set(metrics) == {"a/ppl", "a/tokens", "all/ppl", "all/tokens"}


def test_again_gives_the_same_numbers() -> None:
    heldout, subject = Heldout(data=Words(a=5, b=3), rows=3), Scorer()
    assert heldout(subject, 0) == heldout(subject, 10)


def test_rows_null_takes_everything() -> None:
    counts = [Heldout(data=Words(a=40), rows=rows)(Scorer(), 0)["all/tokens"] for rows in (32, None)]
    assert counts[0] < counts[1]


def test_a_hopeless_student_has_infinite_perplexity() -> None:
    subject = Scorer(NoTeacher())
    subject.score = lambda batch: Scores(nll=1e6 * batch.mask)  # type: ignore[method-assign]
    assert Heldout(data=Words(a=2))(subject, 0)["all/ppl"] == math.inf


def test_a_broken_student_has_no_perplexity() -> None:
    subject = Scorer(NoTeacher())
    subject.score = lambda batch: Scores(nll=math.nan * batch.mask)  # type: ignore[method-assign]
    assert math.isnan(Heldout(data=Words(a=2))(subject, 0)["all/ppl"])


@pytest.mark.parametrize(("name", "value"), [("rows", 0), ("max_length", 1), ("micro_size", 0)])
def test_senseless_sizes_are_refused(name: str, value: int) -> None:
    with pytest.raises(ConfigError, match=f"heldout's {name} is {value}"):
        Heldout(data=Words(a=1), **{name: value})  # type: ignore[arg-type]


def test_a_domain_called_all_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot be called 'all'"):
        Heldout(data=Words(all=2))(Scorer(), 0)
