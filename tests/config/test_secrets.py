"""Literal secrets are found wherever they stand, and nothing else is taken for one."""

from __future__ import annotations

import pytest

from kdcli.config.secrets import in_arguments, in_config

KEY = "sk-" + "abcdefghij" * 3


@pytest.mark.parametrize(
    "argument",
    [
        f"teacher.api_key={KEY}",
        f"+teacher.anything={KEY}",
        "report.wandb.api_key=0123abcd",
        "teacher.token=letmein",
        "x.password='swordfish'",
        "a.url=https://user:pass@host/path",
        "a=hf_" + "A" * 30,
        "a=AKIA" + "A" * 16,
        "a=ghp_" + "a" * 36,
    ],
)
def test_a_literal_secret_is_refused_and_not_repeated(argument: str) -> None:
    (problem,) = in_arguments([argument])
    assert argument.partition("=")[2].strip("'") not in problem
    assert "${oc.env:" in problem


@pytest.mark.parametrize(
    "argument",
    [
        "teacher.api_key=${oc.env:OPENAI_API_KEY}",
        "teacher.api_key_env=OPENAI_API_KEY",
        "teacher.api_key=null",
        "student.eos_token=</s>",
        "tokenizer=gpt2",
        "x.max_new_tokens=256",
        "student.path=sk-models/tiny",
        "data.path=https://host/path",
        "x.keep_layers=[1,2]",
        "-m",
    ],
)
def test_names_of_secrets_and_ordinary_values_pass(argument: str) -> None:
    assert in_arguments([argument]) == []


def test_a_config_tree_is_searched_to_its_leaves() -> None:
    tree = {"a": {"b": [{"token": "letmein"}, {"c": KEY}]}, "eos_token": "</s>", "d": 3}
    problems = in_config(tree)
    assert [p.partition(":")[0] for p in problems] == ["a.b.0.token", "a.b.1.c"]
    assert KEY not in "".join(problems)
