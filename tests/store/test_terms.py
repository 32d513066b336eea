"""The table of terms: what is shipped is known, what is stricter wins, what users write comes first."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from kdcli.errors import ConfigError
from kdcli.store import paths, terms
from kdcli.store.terms import QUESTIONS, STRICTER, UNKNOWN, Terms, cautions, conflicts, joined, terms_of

PACKAGED = yaml.safe_load((paths.configs() / "terms.yaml").read_text())["terms"]


def shipped_licences() -> Iterator[str]:
    for file in sorted((paths.recipes() / "data").rglob("*.jsonl")):
        for line in file.read_text("utf-8").splitlines():
            row = json.loads(line)
            stated = row.get("license") or row.get("meta", {}).get("license")
            yield from [stated] if isinstance(stated, str) else stated or []


def test_every_licence_of_the_shipped_data_is_known_and_allows_training() -> None:
    stated = set(shipped_licences())
    assert len(stated) >= 7
    table = (paths.recipes() / "data/LICENSES.md").read_text()
    stated |= set(re.findall(r"\b(?:CC0-1\.0|PDDL-1\.0|PSF-2\.0|Apache-2\.0|MIT)\b", table)) | {"WordNet"}
    assert {one: terms_of(license=one).outputs_may_train for one in stated} == dict.fromkeys(stated, "yes")


@pytest.mark.parametrize("row", PACKAGED, ids=lambda row: row["id"])
def test_each_row_says_all_that_is_asked_and_when_it_was_read(row: dict[str, object]) -> None:
    assert row["kind"] in ("licence", "terms")
    assert all(row[question] in STRICTER for question in QUESTIONS)
    datetime.date.fromisoformat(str(row["checked_on"]))
    assert isinstance(row["verified"], bool)
    assert row["id"] == "proprietary" or row["source"]


@pytest.mark.parametrize(
    ("stated", "found"),
    [
        ("apache-2.0", "Apache-2.0"),
        ("Apache License 2.0", "Apache-2.0"),
        ("CC BY 4.0", "CC-BY"),
        ("cc-by-nc-sa-4.0", "CC-BY-NC"),
        ("CC-BY-SA-3.0", "CC-BY-SA"),
        ("CC0-1.0 (HL7 FHIR R5 text)", "CC0-1.0"),
        ("MIT OR GPL-3.0-or-later", "MIT"),
        ("MIT AND GPL-3.0-only", "MIT+GPL"),
        ("Apache-2.0 WITH LLVM-exception", "Apache-2.0"),
        ("MIT AND House-1.0", "MIT+unknown"),
        ("House Licence (MIT)", "unknown+MIT"),
        ("Apache-2.0 non-commercial", "unknown"),
        ("bigscience-openrail-m", "openrail"),
        ("llama3.3", "llama3.1"),
    ],
)
def test_licences_are_known_as_people_write_them(stated: str, found: str) -> None:
    assert terms_of(license=stated).id == found


@pytest.mark.parametrize(
    ("model", "found"),
    [
        ("gpt-4o-mini", "openai"),
        ("gpt2-xl", "MIT"),
        ("openai/gpt-oss-20b", "Apache-2.0"),
        ("meta-llama/Meta-Llama-3-8B", "llama3"),
        ("meta-llama/Llama-3.1-8B-Instruct", "llama3.1"),
        ("deepseek-ai/DeepSeek-R1", "MIT"),
        ("deepseek-ai/DeepSeek-R1-Distill-Llama-8B", "llama3.1"),
        ("Qwen/Qwen2.5-72B-Instruct", "qwen"),
        ("Qwen/Qwen2.5-3B", "qwen-research"),
        ("Qwen/Qwen2.5-7B", "qwen-apache"),
        ("google/gemma-2-9b-it", "gemma"),
        ("claude-opus-4-1", "anthropic"),
        ("my-own-model", "unknown"),
    ],
)
def test_models_are_known_by_name_where_no_licence_is_stated(model: str, found: str) -> None:
    assert terms_of(model=model).id == found
    assert terms_of(license="MIT", model=model).id == "MIT"


def test_an_endpoint_s_terms_hold_besides_the_licence() -> None:
    found = terms_of("llama3.1", "https://api.together.xyz/v1", "x")
    assert found.id == "host-of-open-models+llama3.1"
    assert terms_of(endpoint="api.openai.com:443", license="MIT").competing_models == "no"
    assert terms_of(endpoint="notapi.openai.com.example.org:443").id == "unknown"
    assert terms_of(endpoint="127.0.0.1:8000", model="x") == UNKNOWN


def test_joined_terms_are_the_strictest_of_each_in_any_order() -> None:
    parts = [terms_of(license=one) for one in ("MIT", "CC-BY-SA-4.0", "CC-BY-NC-4.0")]
    for order in (parts, parts[::-1]):
        found = joined(order)
        assert (found.outputs_may_train, found.commercial, found.competing_models) == ("conditional", "no", "no")
        assert found.share_alike
    assert joined([]) == UNKNOWN
    assert terms_of(given=joined(parts).id) == joined(parts)


def test_what_conflicts_depends_on_the_use_and_grows_with_it() -> None:
    found = [("teacher", one.id, one) for one in (terms_of(given=row["id"]) for row in PACKAGED)]
    sizes = [len(conflicts(use, (), found)) for use in (None, "research", "commercial", "competing")]
    assert sizes == sorted(sizes)
    assert sizes[0] == 0 < sizes[1] < sizes[2] < sizes[3]
    everything = [row["id"] for row in PACKAGED]
    assert conflicts("competing", everything, found) == cautions(None, everything, found) == []


def test_a_sentence_names_terms_use_source_and_way_out() -> None:
    (sentence,) = conflicts("competing", (), [("teacher", "gpt-4o", terms_of(model="gpt-4o"))])
    for part in (
        "teacher gpt-4o",
        "openai",
        "use=competing",
        "https://openai.com",
        "acknowledge openai",
        "no legal advice",
    ):
        assert part in sentence
    (sentence,) = cautions("research", (), [("data", "rows", UNKNOWN)])
    assert "not known" in sentence
    with pytest.raises(ConfigError, match="research, commercial, competing"):
        conflicts("war", (), [])


def test_a_user_s_row_comes_before_the_packaged_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = terms.fingerprint()
    (tmp_path / "configs").mkdir()
    own = "terms:\n  - {id: MIT, kind: licence, outputs_may_train: no, commercial: yes}\n"
    own += "  - {id: house, kind: terms, matches: {hosts: [llm.example.org]}, outputs_may_train: yes}\n"
    (tmp_path / "configs/terms.yaml").write_text(own)
    assert terms_of(license="MIT") == Terms(id="MIT", kind="licence", outputs_may_train="no", commercial="yes")
    assert terms_of(endpoint="llm.example.org:443").id == "house"
    assert terms_of(license="Apache-2.0").outputs_may_train == "yes"
    assert terms.fingerprint() != before


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("- a\n", "no list `terms`"),
        ("terms: [{id: x}]", "kind licence or terms"),
        ("terms: [{id: x, kind: terms, commercial: perhaps}]", "write one of yes"),
        ("terms: [{id: x, kind: terms, sorce: y}]", "no key sorce"),
        ("terms: [{id: x+y, kind: terms}]", "has no +"),
        ("terms: [{id: x, kind: terms, matches: {host: [y]}}]", "licences, hosts and models"),
        ("terms: [", "cannot be read"),
    ],
)
def test_a_broken_table_is_named(content: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/terms.yaml").write_text(content)
    with pytest.raises(ConfigError, match=re.escape(says)):
        terms_of(license="MIT")


def test_an_unknown_id_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean openai"):
        terms_of(given="openia")
