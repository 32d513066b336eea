"""What objectives ask of data, batch and tokenizers is told before anything loads, with what would do without."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kdcli.api import Data, Example, Need, Objective, Unit
from kdcli.command.compose import compose, hydra, plain
from kdcli.config import cross, demands
from kdcli.config.check import check
from kdcli.data.jsonl import Jsonl
from kdcli.errors import ConfigError
from kdcli.store import paths


class Asking(Objective):
    """An objective of no use but for what it asks."""

    def __init__(self, *columns: str, needs: Need = Need.NOTHING, domains: tuple[str, ...] = ()) -> None:
        super().__init__(domains=domains)
        self.columns = frozenset(columns)
        self.needs = needs

    def forward(self, batch: Any, student: Any, teacher: Any) -> Any:
        raise AssertionError("only asked")


class Comparing(Asking):
    unit = Unit.GROUP


class Counted(Data):
    """Rows that remember how many of them were read."""

    def __init__(self, **domains: list[Example]) -> None:
        self.rows, self.read = domains, 0

    def domains(self) -> dict[str, Iterable[Example]]:
        return {name: _Reading(self, rows) for name, rows in self.rows.items()}

    def fingerprint(self) -> str:
        return repr(self.rows)


class _Reading:
    def __init__(self, data: Counted, rows: list[Example]) -> None:
        self.data, self.rows = data, rows

    def __iter__(self) -> Iterator[Example]:
        for row in self.rows:
            self.data.read += 1
            yield row


PLAIN = [Example(prompt="a", response="b")]
PAIR = [Example(prompt="a", chosen="b", rejected="c")]
SCORED = [Example(prompt="a", response="b", score=1.0)]
GROUP = [Example(prompt="a", response="b", score=1.0, group="g")] * 2
HINTED = [Example(prompt="a", response="b", teacher_prompt="hint", where="x:7")]


def problems(data: Counted, *terms: Objective, given: Need = Need.DISTRIBUTION) -> list[str]:
    named = {f"objective.t{number}": term for number, term in enumerate(terms)}
    return demands.of_data(data, named, "rows.jsonl", given)


@pytest.mark.parametrize(
    ("column", "rows", "others"),
    [
        ("rejected", PAIR, [*PLAIN, *SCORED, *GROUP]),
        ("score", SCORED, [*PLAIN, *PAIR]),
        ("group", GROUP, [*PLAIN, *SCORED, *GROUP[:1], Example(prompt="a", response="b", group="g")]),
    ],
)
def test_a_column_that_no_row_has_is_named_with_objectives_that_do_without(
    column: str, rows: list[Example], others: list[Example]
) -> None:
    assert problems(Counted(a=others + rows), Asking(column)) == []
    (problem,) = problems(Counted(a=others), Asking(column))
    assert problem.startswith("objective.t0: Asking needs ")
    assert demands.ROWS[column] in problem
    assert "the data (rows.jsonl) have none" in problem
    assert "forward_kl" in problem


def test_alternatives_work_with_the_teacher_there_is() -> None:
    (problem,) = problems(Counted(a=PLAIN), Asking("rejected"), given=Need.NOTHING)
    assert "cross_entropy" in problem
    assert "forward_kl" not in problem


def test_rows_are_asked_of_the_domains_that_a_term_trains_on() -> None:
    data = Counted(a=PAIR, b=PLAIN)
    assert problems(data, Asking("rejected")) == []
    assert problems(data, Asking("rejected", domains=("a",))) == []
    assert len(problems(data, Asking("rejected", domains=("b",)), Asking("rejected"))) == 1


def test_groups_of_one_name_in_two_domains_are_two() -> None:
    assert problems(Counted(a=GROUP[:1], b=GROUP[:1]), Asking("group"))


def test_reading_stops_where_all_was_seen() -> None:
    data = Counted(a=PLAIN + PAIR + PLAIN * 9999, b=PLAIN * 9)
    assert problems(data, Asking("rejected")) == []
    assert data.read <= 2 + 9
    late = Counted(a=PLAIN * 5000 + PAIR + PLAIN * 5000)
    assert problems(late, Asking("rejected")) == []
    assert late.read == demands.GLANCE + 5001
    unasked = Counted(a=PLAIN)
    assert problems(unasked, Asking()) == []
    assert unasked.read == 0


@pytest.mark.parametrize("needs", [Need.ATTENTION, Need.RELATIONS])
def test_positions_are_not_compared_after_another_prompt(needs: Need) -> None:
    (problem,) = problems(Counted(a=PLAIN + HINTED), Asking(needs=needs))
    assert "x:7 has a teacher_prompt" in problem
    assert problems(Counted(a=PLAIN), Asking(needs=needs)) == []
    assert problems(Counted(a=HINTED), Asking(needs=Need.HIDDEN)) == []


@pytest.mark.parametrize("term", [Asking("rejected"), Asking("group", "score"), Comparing()])
def test_what_is_compared_is_not_packed(term: Objective) -> None:
    for packing in (True, False):
        found = demands.of_batch({"batch": {"packing": packing}}, {"objective.kd": term})
        assert bool(found) == packing
        assert all(problem.startswith("batch.packing: objective.kd") for problem in found)
    assert demands.of_batch({"batch": {"packing": True}}, {"objective.kd": Asking("score")}) == []


def test_the_objectives_for_different_tokenizers_are_found_not_listed() -> None:
    """As the classes say, by the names of their options."""
    names = demands.alternatives(lambda objective: objective.cross_tokenizer)
    assert {"uld", "gold", "alm"} <= set(names)
    assert not {"forward_kl", "cross_entropy"} & set(names)
    (problem,) = cross.tokenizer_problems({"a": 0, "b": 1}, {"a": 1, "b": 0}, ["objective.kd (ForwardKL)"])
    assert "objective.kd (ForwardKL) compares them id by id" in problem
    assert f"objective={demands.cross_tokenizer_names()}" in problem


def test_only_what_reads_the_teacher_s_text_needs_its_ids() -> None:
    terms = {
        "objective.a": Asking(needs=Need.LOGITS),
        "objective.b": Asking(needs=Need.HIDDEN),
        "objective.c": Asking(needs=Need.REWARD | Need.REFERENCE),
        "objective.d": Asking(),
    }
    assert demands.of_tokenizers(terms) == ["objective.a (Asking)", "objective.b (Asking)"]


def test_names_are_told_as_one_reads_them() -> None:
    assert [demands.named(names) for names in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == [
        "",
        "a",
        "a or b",
        "a, b or c",
    ]
    assert demands.named(map(str, range(99))).endswith("7 …")


def test_a_row_that_cannot_be_read_is_named_by_its_line(tmp_path: Any) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": "a", "response": "b"}) + "\n{\n")
    with pytest.raises(ConfigError, match=r"rows.jsonl:2: broken JSON"):
        demands.of_data(Jsonl(path=str(file)), {"objective.t": Asking("score")}, "rows.jsonl", Need.NOTHING)


# ------------------------------------------------------------------------------------------------ whole configurations


@pytest.fixture(scope="module")
def tiny() -> dict[str, Any]:
    with hydra() as app:
        return plain(compose(app, "distill", ["+recipe=tiny", "batch.packing=false"]), "distill")


def other_tokenizer(folder: Path, *, more: int = 0, swap: bool = False) -> str:
    """The tiny teacher's tokenizer with ids that others do not have, or with two tokens swapped."""
    shutil.copytree(paths.resolve("recipes://data/tiny_teacher"), folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    if swap:
        a, b = list(vocabulary)[1000:1002]
        vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    size = 1 + max(vocabulary.values())
    vocabulary |= {f"extra{number}": size + number for number in range(more)}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return str(folder)


def student_with(tiny: dict[str, Any], tokenizer: str, **objective: Any) -> dict[str, Any]:
    config = copy.deepcopy(tiny)
    config["student"]["tokenizer"] = tokenizer
    config["objective"] = {"kd": {"_target_": "kdcli.objective.forward_kl.ForwardKL", **objective}}
    return config


def test_other_ids_need_an_objective_for_them(tiny: dict[str, Any], tmp_path: Path) -> None:
    config = student_with(tiny, other_tokenizer(tmp_path / "other", swap=True))
    with pytest.raises(ConfigError) as refused:
        check(config)
    assert "2 of 4,096 tokens have another id" in str(refused.value)
    assert "objective.kd (ForwardKL) compares them id by id" in str(refused.value)
    assert "a cross-tokenizer objective: objective=alm, dskd" in str(refused.value)
    config["objective"]["kd"] = {"_target_": "kdcli.objective.uld.ULD"}
    config["objective"]["ce"] = {"_target_": "kdcli.objective.cross_entropy.CrossEntropy"}
    check(config)
    config["objective"] = {"ce": config["objective"]["ce"]}
    check(config)


def test_an_evaluation_compares_no_other_ids(tmp_path: Path) -> None:
    tokenizer = other_tokenizer(tmp_path / "other", swap=True)
    with hydra() as app:
        given = ["teacher=hf", "teacher.path=recipes://data/tiny_teacher", f"student.tokenizer={tokenizer}"]
        given += ["student.path=recipes://data/tiny_teacher", "evaluation.heldout.data.path=recipes://data/mini/valid"]
        config = plain(compose(app, "evaluate", given), "evaluate")
    with pytest.raises(ConfigError, match="to evaluate the student alone set teacher=none"):
        check(config)


def test_a_longer_vocabulary_is_cut_or_refused_as_the_term_says(tiny: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = other_tokenizer(tmp_path / "longer", more=3)
    check(student_with(tiny, tokenizer, vocabulary="shared"))
    with pytest.raises(ConfigError, match=r"objective.kd: .*vocabulary is error, and the student has 4,099 ids"):
        check(student_with(tiny, tokenizer, vocabulary="error"))
