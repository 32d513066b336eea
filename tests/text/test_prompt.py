"""Prompt files and their templates: what they may name, and what they cannot do."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from kdcli.api import Example
from kdcli.errors import ConfigError
from kdcli.store.examples import BadRow
from kdcli.text import prompt as module
from kdcli.text.prompt import Expression, Prompt, rendered, template, variables

FILE: dict[str, Any] = {
    "paper": "none: ours",
    "system": "Be brief.",
    "turns": [{"role": "user", "content": "Hello {{ domain }}"}, {"role": "assistant", "content": "Hello."}],
    "user": "  {{ prompt }} ({{ meta.view | default('plain') }})\n",
    "student": "{{ prompt }}!",
    "parse": {"kind": "text"},
    "example": "yes",
}


def made(**changes: Any) -> Prompt:
    content = {key: value for key, value in {**FILE, **changes}.items() if value is not None}
    return Prompt(content, name="say", where="here", extra=("other",))


def render(source: str, **values: Any) -> str:
    return rendered(template(source, where="here", names={"x", "meta", *values}), {"meta": {}, **values}, "here")


def test_a_row_becomes_a_chat_and_the_students_prompt() -> None:
    row = Example(prompt="Why?", domain="law", meta={"view": "short"})
    roles = [(one["role"], one["content"]) for one in made().messages(row)]
    assert roles == [("system", "Be brief."), ("user", "Hello law"), ("assistant", "Hello."), ("user", "Why? (short)")]
    assert made().for_student(row) == "Why?!"
    assert made(student=None).for_student(row) is None


def test_equal_files_have_equal_hashes_and_others_have_not() -> None:
    assert made().hash == made().hash
    assert len({made().hash, made(system="Be long.").hash, made(parse={"kind": "text", "field": "x"}).hash}) == 3


@pytest.mark.parametrize("key", ["paper", "user", "parse", "example"])
def test_a_file_without_what_it_needs_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=f"here: say lacks {key}"):
        made(**{key: None})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"users": "x"}, "say has no key users"),
        ({"user": "{{ question }}"}, "say names question, which no row has; other columns of the data are meta.NAME"),
        ({"student": "{{ answer }}"}, "say names answer"),
        ({"turns": [{"role": "user", "content": "{{ history }}"}]}, "say names history"),
        ({"user": "{% if %}"}, "say: line 1"),
        ({"user": "{{ prompt | random }}"}, "No filter named"),
        ({"user": "{% include '/etc/passwd' %}"}, "a prompt has no include"),
        ({"user": "{% import 'x' as y %}"}, "a prompt has no import"),
        ({"user": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"}, "a prompt has no macro"),
    ],
)
def test_a_wrong_file_is_a_config_error_that_names_it(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        made(**changes)
    assert "here" in str(caught.value)


def test_an_example_that_does_not_parse_is_a_broken_file(tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text("paper: x\nuser: x\nexample: none\nparse: {kind: number, minimum: 0, maximum: 1}\n")
    with pytest.raises(ConfigError, match="its example does not parse: the answer's score is no number"):
        Prompt.load(str(file), where="here")


@pytest.mark.parametrize("text", ["- a list", "a: [", "\x00"])
def test_a_file_that_is_no_mapping_is_a_config_error(tmp_path: Path, text: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"bad\.yaml"):
        Prompt.load(str(file), where="here")


def test_an_unknown_name_lists_what_there_is() -> None:
    with pytest.raises(ConfigError, match=r"there is no prompt label/answr; there are .*label/answer"):
        Prompt.load("label/answr", where="here")
    with pytest.raises(ConfigError, match="there is no prompt"):
        Prompt.load("../augmentation/label", where="here")


def test_a_users_own_prompt_comes_before_the_packaged_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "configs" / "prompt" / "label"
    folder.mkdir(parents=True)
    (folder / "answer.yaml").write_text("paper: x\nuser: mine\nexample: x\nparse: {kind: text}\n")
    monkeypatch.chdir(tmp_path)
    assert Prompt.load("label/answer", where="here").content["user"] == "mine"
    assert "label/answer" in module.names()


def test_a_row_that_lacks_a_field_is_a_bad_row() -> None:
    for row in (Example(text="no prompt"), Example(prompt="x", meta={})):
        with pytest.raises(BadRow) as caught:
            made(user="{{ prompt }} {{ meta.view }}").messages(row)
        assert caught.value.reason == "lacks a field"


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ meta.__class__ }}",
        "{{ x.__init__.__globals__ }}",
        "{{ x['__class__'] }}",
        "{{ meta | map(attribute='__class__') | list | first }}",
        "{{ range.__self__ }}",
        "{{ [].append(1) }}",
        "{{ meta.update({'a': 1}) }}",
        "{{ (x | selectattr('__class__') | list)[0].__class__ }}",
        "{{ '{0.__class__}'.format(x) }}",
        "{{ x.format_map(meta) }}",
        "{{ dict.__subclasses__() }}",
    ],
)
def test_templates_cannot_reach_python(source: str) -> None:
    with pytest.raises(BadRow):
        render(source, x=Example(prompt="p"))
    assert module.ENVIRONMENT.globals.keys() == {"range", "dict"}


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(100000000) %}x{% endfor %}",
        "{% for i in range(1000) %}" * 3 + "{% endfor %}" * 3,
        "{{ 'x' * 1000000000 }}",
        "{{ 1000000000 * [1] }}",
        "{{ 9 ** 9 ** 9 }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ 'x'.ljust(1000000000) }}",
        "{{ x | replace('', x) | replace('', x) | replace('', x) }}",
        "".join("{% set x = x ~ x %}" for _ in range(60)) + "{{ x | length }}",
        "".join("{% set x = x + x %}" for _ in range(60)) + "{{ x | length }}",
        "{% for i in range(1000) %}{{ x * 10 }}{% endfor %}",
        "{{ range(1000) | join(x * 10) }}",
    ],
)
def test_templates_come_to_an_end(source: str) -> None:
    began = time.process_time()
    with pytest.raises(BadRow) as caught:
        render(source, x="y" * 1000)
    assert caught.value.reason == "template failed"
    assert time.process_time() - began < 2


def test_ordinary_templates_say_what_they_should() -> None:
    values = {"x": ["a", "b"], "meta": {"k": 1, "rows": [{"n": 1}, {"n": 2}]}}
    for source, text in (
        ("{% for one in x %}{{ loop.index }}{{ one }}{{ ',' if not loop.last }}{% endfor %}", "1a,2b"),
        ("{{ x | join(' and ') }}", "a and b"),
        ("{{ meta.rows | map(attribute='n') | join(',') }} {{ meta.rows | join('+', attribute='n') }}", "1,2 1+2"),
        ("{{ 'a' ~ 1 ~ 'b' }}", "a1b"),
        ("{{ ['<é>', 1] | tojson }}", '["<é>", 1]'),
        ("{{ 2 * 3 + 1 }}{{ 'a' * 3 }}{{ 2 ** 3 }}", "7aaa8"),
        ("{{ meta.none | default('d') }}{{ 'aXa' | replace('X', '-') }}", "da-a"),
        ("{% for k, v in meta.items() if k == 'k' %}{{ k }}={{ v }}{% endfor %}", "k=1"),
    ):
        assert render(source, **values) == text


def test_expressions_are_values_and_not_texts() -> None:
    row = variables(Example(prompt="p", score=4.0, meta={"list": [1], "ok": True}))
    assert Expression("meta.list", where="here")(row) == [1]
    assert Expression("score >= 4 and meta.ok", where="here").holds(row)
    assert not Expression("meta.other is defined", where="here").holds(row)
    assert not Expression("response is defined", where="here").holds(row)
    for source, reason in (
        ("meta.other", "lacks a field"),
        ("response", "lacks a field"),
        ("score + prompt", "template failed"),
    ):
        with pytest.raises(BadRow) as caught:
            Expression(source, where="here")(row)
        assert caught.value.reason == reason
    for source in ("scor > 1", "score >", "{{ score }}", "score }} {{ prompt"):
        with pytest.raises(ConfigError, match="here"):
            Expression(source, where="here")
