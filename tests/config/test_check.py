"""A config against its constructors and against itself."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcli.command.compose import compose, hydra, plain
from kdcli.config import cross
from kdcli.config.check import check, shape_problems
from kdcli.errors import ConfigError


@pytest.fixture(scope="module")
def tiny() -> dict[str, Any]:
    with hydra() as app:
        return plain(compose(app, "distill", ["+recipe=tiny"]), "distill")


def changed(config: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    config = copy.deepcopy(config)
    node: Any = config
    *parents, last = path.split(".")
    for parent in parents:
        node = node.setdefault(parent, {})
    node[last] = value
    return config


def leaves(node: Any, prefix: str = "") -> list[str]:
    return [
        leaf
        for key, value in node.items()
        for leaf in (leaves(value, f"{prefix}{key}.") if isinstance(value, dict) and value else [f"{prefix}{key}"])
    ]


def test_a_recipe_is_sound(tiny: dict[str, Any]) -> None:
    check(tiny)


def test_every_misspelt_key_is_found(tiny: dict[str, Any]) -> None:
    """A letter doubled in any key that a constructor takes, one at a time."""
    free = ("verb", "student_init.config.")  # a transformers config: student_init checks it when it builds
    for leaf in leaves(tiny):
        if leaf.startswith(free) or leaf.endswith("_target_"):
            continue
        parent, _, last = leaf.rpartition(".")
        slip = f"{parent}.{last[:2]}{last[1:]}".lstrip(".")
        problems = shape_problems(changed(tiny, slip, 1))
        assert problems, slip
        assert any(problem.startswith(f"{slip}: ") for problem in problems), (slip, problems)
        assert any(leaf in problem or last in problem for problem in problems)


def test_no_value_may_be_a_mapping_where_a_number_is_wanted(tiny: dict[str, Any]) -> None:
    for leaf in ("run.steps", "batch.size", "optimizer.lr", "engine.stage", "objective.kd.weight", "launch.processes"):
        (problem,) = shape_problems(changed(tiny, leaf, {"a": 1}))
        assert problem.startswith(f"{leaf}: is {{'a': 1}}, but must be ")


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("objective.kd", {"weight": 1}, "objective.kd: chooses no objective; write objective@objective.kd=NAME"),
        ("objective", {"_target_": "x"}, "objective: maps names to components"),
        ("teacher", None, "teacher: chooses no teacher; write teacher=NAME"),
        ("teacher._target_", "kdcli.teacher.hf.HFTeach", "kdcli.teacher.hf has no HFTeach; did you mean HFTeacher?"),
        ("teacher._target_", "kdcli.teacher.hg.HFTeacher", "there is no module kdcli.teacher.hg"),
        ("teacher._target_", "kdcli.student.hf.HFStudent", "_target_ kdcli.student.hf.HFStudent is not allowed here"),
        ("optimizer._target_", "torch.optim.Sorcery", "torch.optim has no Sorcery"),
        (
            "data",
            {"_target_": "kdcli.data.mixture.Mixture", "domains": {"a": {"path": "x"}}},
            "data.domains.a: chooses no data",
        ),
        (
            "data",
            {
                "_target_": "kdcli.data.mixture.Mixture",
                "domains": {"a": {"_target_": "kdcli.data.jsonl.Jsonl", "pth": "x"}},
            },
            "data.domains.a.pth: Jsonl has no such setting; did you mean data.domains.a.path?",
        ),
        (
            "evaluation.heldout.data",
            {"_target_": "kdcli.data.jsonl.Jsonl"},
            "evaluation.heldout.data.path: must be given",
        ),
        ("optimize", 3, "optimize: is 3"),
        ("run", 3, "run: is 3, but must be a mapping"),
        ("run.minutes", -1, "run.minutes: is -1, but must be at least 0"),
        ("batch.overflow", "wrap", "batch.overflow: is 'wrap', but must be one of split, truncate"),
    ],
)
def test_a_wrong_shape_is_named(tiny: dict[str, Any], path: str, value: Any, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        check(changed(tiny, path, value))
    assert says in str(error.value)


@settings(max_examples=200)
@given(size=st.integers(1, 64), micro=st.integers(1, 64), processes=st.integers(1, 8))
def test_what_the_batch_message_proposes_is_right(size: int, micro: int, processes: int) -> None:
    def config(size: int, micro: int) -> dict[str, Any]:
        return {"batch": {"size": size, "micro_size": micro}, "launch": {"processes": processes}}

    problems = cross._batch(config(size, micro))
    assert bool(problems) == (size % (micro * processes) != 0)
    for problem in problems:
        proposals = [
            int(word.split("=")[1]) for word in problem.replace(",", " ").split() if "=" in word and word[0] == "b"
        ]
        assert not cross._batch(config(proposals[0], micro))
        assert proposals[0] > size
        if len(proposals) > 1:
            assert not cross._batch(config(size, proposals[1]))


VOCABULARY = st.lists(st.text(min_size=1), min_size=2, max_size=30, unique=True)


@given(VOCABULARY, st.integers(0, 5))
def test_equal_and_padded_vocabularies_agree(tokens: list[str], padding: int) -> None:
    one = {token: index for index, token in enumerate(tokens)}
    padded = one | {f"<pad {i}> {'x' * 50}": len(tokens) + i for i in range(padding)}
    assert cross.tokenizer_problems(one, padded) == []
    assert cross.tokenizer_problems(padded, one) == []


@given(VOCABULARY, st.data())
def test_vocabularies_of_equal_size_and_other_ids_do_not_agree(tokens: list[str], data: st.DataObject) -> None:
    one = {token: index for index, token in enumerate(tokens)}
    a, b = data.draw(st.lists(st.sampled_from(tokens), min_size=2, max_size=2, unique=True))
    swapped = one | {a: one[b], b: one[a]}
    (problem,) = cross.tokenizer_problems(one, swapped)
    assert f"2 of {len(tokens):,} tokens have another id" in problem
    assert "cross-tokenizer objective" in problem


def test_a_student_with_another_tokenizer_is_refused(tiny: dict[str, Any], tmp_path) -> None:
    """The same vocabulary with two ids swapped: equal in size, different in meaning."""
    import json
    import shutil

    from kdcli.store import paths

    other = tmp_path / "other"
    shutil.copytree(paths.resolve("recipes://data/tiny_teacher"), other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    a, b = list(vocabulary)[1000:1002]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(
        ConfigError, match=r"student: its tokenizer is not the teacher's: 2 of 4,096 tokens have another id"
    ):
        check(changed(tiny, "student.tokenizer", str(other)))
    check(changed(tiny, "student.tokenizer", "recipes://data/tiny_teacher"))
