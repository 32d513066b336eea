"""What rows say of where they come from is counted, whoever made them and whatever else they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kdcli.store import provenance, terms


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("KDCLI_CACHE", str(tmp_path / "cache"))

    def write(*rows: dict[str, Any], name: str = "rows.jsonl") -> Path:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tmp_path / name

    return write


def by(teacher: str, **entry: str) -> dict[str, str]:
    return {"step": "answer", "by": "teacher", "teacher": teacher, "endpoint": "host:1", "template": "t", **entry}


ROWS = (
    {"prompt": "a", "response": "b", "meta": {"source": "mine", "license": "MIT", "written": [by("x"), by("y")]}},
    {"prompt": "c", "response": "d", "meta": {"license": ["MIT", "CC-BY-4.0"], "written": [by("x")]}},
    {"prompt": "e", "source": "column"},
    {"text": "f"},
)


def test_rows_are_counted_by_source_licence_and_writer(write) -> None:
    found = provenance.of_file(write(*ROWS))
    assert (found.rows, found.prompts) == (4, 1)
    assert found.sources == {"column": 1, "mine": 1, "unstated": 2}
    assert found.licences == {"MIT": 1, "MIT + CC-BY-4.0": 1, "unstated": 2}
    assert {entry["teacher"]: entry["rows"] for entry in found.written} == {"x": 2, "y": 1}
    assert found.says_something


def test_files_together_are_one_file(write) -> None:
    whole = provenance.of_file(write(*ROWS))
    parts = [provenance.of_file(write(*part, name=f"{i}.jsonl")) for i, part in enumerate((ROWS[:1], ROWS[1:]))]
    assert provenance.joined(parts) == whole


def test_a_changed_file_is_read_again(write) -> None:
    file = write(*ROWS)
    assert provenance.of_file(file) == provenance.of_file(file)
    assert provenance.of_file(write(*ROWS[:1])).rows == 1
    assert not provenance.of_file(write({"text": "f"})).says_something


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"terms": "openai", "teacher": "anything"}, "openai"),
        ({"terms": "unknown", "teacher": "gpt-4o", "endpoint": "127.0.0.1:8000"}, "openai"),
        ({"terms": "of-another-table", "teacher": "mine", "endpoint": "127.0.0.1:8000"}, "unknown"),
        ({"terms": "MIT+of-another-table", "teacher": "mine"}, "MIT+unknown"),
        ({"teacher": "claude-x", "endpoint": "api.anthropic.com:443"}, "anthropic"),
    ],
)
def test_terms_of_an_entry_are_its_tags_or_else_its_teachers(entry: dict[str, str], expected: str) -> None:
    assert provenance.terms_of_entry(entry).id == expected


def test_what_forbids_a_use_is_found_in_rows(write) -> None:
    found = provenance.of_file(write({"text": "a", "license": "CC-BY-NC-4.0", "meta": {"written": [by("gpt-4o")]}}))
    told = terms.conflicts("competing", (), provenance.terms_in(found))
    assert len(told) == 2
    assert terms.conflicts("research", (), provenance.terms_in(found)) == []
