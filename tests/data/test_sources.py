"""Sources of named domains: files, the hub's library, mixtures."""

from __future__ import annotations

import json
from operator import length_hint
from pathlib import Path
from typing import Any

import pytest

from kdcli.api import Data
from kdcli.data.hub import Hub
from kdcli.data.jsonl import Jsonl
from kdcli.data.mixture import Mixture
from kdcli.errors import ConfigError, DataError


def write(path: Path, *rows: Any) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def texts(data: Data) -> dict[str, list[str | None]]:
    return {name: [example.text for example in rows] for name, rows in data.domains().items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "data" / "code.jsonl", {"text": "c1"}, {"text": "c2"}, {"text": "c3"})
    write(tmp_path / "data" / "prose.train.jsonl", {"text": "p1"})
    write(tmp_path / "data" / "notes.md", "not data")
    return tmp_path / "data"


def test_a_folder_has_a_domain_per_file(folder: Path) -> None:
    assert texts(Jsonl(path=str(folder))) == {"code": ["c1", "c2", "c3"], "prose": ["p1"]}


def test_files_globs_and_repetitions_are_read_once(folder: Path) -> None:
    paths = [str(folder / "code.jsonl"), str(folder / "*.jsonl")]
    assert texts(Jsonl(path=paths)) == {"code": ["c1", "c2", "c3"], "prose": ["p1"]}


def test_a_domain_for_all(folder: Path) -> None:
    data = Jsonl(path=str(folder), domain="mine")
    assert texts(data) == {"mine": ["c1", "c2", "c3", "p1"]}
    assert {example.domain for example in data.domains()["mine"]} == {"mine"}


def test_rows_say_their_domain_and_may_share_a_file(tmp_path: Path) -> None:
    file = write(
        tmp_path / "all.jsonl",
        {"text": "1", "domain": "code"},
        {"text": "2"},
        {"text": "3", "domain": "prose"},
        {"text": "4", "domain": "code"},
    )
    data = Jsonl(path=str(file))
    assert texts(data) == {"code": ["1", "4"], "all": ["2"], "prose": ["3"]}
    assert {name: length_hint(rows) for name, rows in data.domains().items()} == {"code": 2, "all": 1, "prose": 1}


def test_a_column_may_say_the_domain(tmp_path: Path) -> None:
    file = write(tmp_path / "all.jsonl", {"text": "1", "kind": "code"}, {"text": "2", "kind": "prose"})
    assert texts(Jsonl(path=str(file), columns={"domain": "kind"})) == {"code": ["1"], "prose": ["2"]}


def test_a_limit_is_per_domain(folder: Path) -> None:
    data = Jsonl(path=str(folder), limit=2)
    assert texts(data) == {"code": ["c1", "c2"], "prose": ["p1"]}
    assert length_hint(data.domains()["code"]) == 2


def test_rows_can_be_read_again(folder: Path) -> None:
    rows = Jsonl(path=str(folder)).domains()["code"]
    assert list(rows) == list(rows) != []


def test_a_bad_row_before_the_limit_is_not_forgiven(tmp_path: Path) -> None:
    file = write(tmp_path / "code.jsonl", "{", {"text": "a"}, {"text": "b"})
    with pytest.raises(ConfigError, match=r"code.jsonl:1: broken JSON"):
        texts(Jsonl(path=str(file), limit=1))


def test_bad_rows_are_kept_by_place_and_too_many_are_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "code.jsonl", "{", {"text": "a"}, {"text": "b"}, {"text": "c"})
    data = Jsonl(path=str(file), max_bad_fraction=0.25)
    assert texts(data) == {"code": ["a", "b", "c"]}
    assert data.bad_rows() == {f"{file}:1": "broken JSON"}
    with pytest.raises(DataError, match="1 of 4 rows"):
        texts(Jsonl(path=str(file), max_bad_fraction=0.2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": "nowhere.jsonl"}, r"nowhere.jsonl: there is no such file or folder"),
        ({"path": "*.nothing"}, r"there is no such file or folder"),
        ({"path": "empty"}, r"the folder has no .jsonl files; data=hub"),
        ({"path": "empty.jsonl"}, r"empty.jsonl: the file has no rows"),
        ({"path": "code.jsonl", "limit": 0}, r"data.limit is 0"),
        ({"path": "code.jsonl", "domain": "my code"}, r"'my code' cannot name a domain"),
        ({"path": "code.jsonl", "columns": {"promt": "x"}}, r"data.columns.promt: .*did you mean data.columns.prompt"),
    ],
)
def test_wrong_settings_are_sentences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], message: str
) -> None:
    write(tmp_path / "code.jsonl", {"text": "a"})
    write(tmp_path / "empty.jsonl")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        Jsonl(**settings).domains()


def test_a_fingerprint_is_of_the_content_not_of_the_place(folder: Path, tmp_path: Path) -> None:
    before = Jsonl(path=str(folder)).fingerprint()
    folder.rename(tmp_path / "moved")
    folder = tmp_path / "moved"
    assert Jsonl(path=str(folder)).fingerprint() == before
    seen = {before}
    for settings in ({"limit": 1}, {"domain": "x"}, {"columns": {"text": "text"}}):
        seen.add(Jsonl(path=str(folder), **settings).fingerprint())
    write(folder / "code.jsonl", {"text": "c1"}, {"text": "c2"}, {"text": "c4"})  # of the same size
    seen.add(Jsonl(path=str(folder)).fingerprint())
    assert len(seen) == 5


def test_a_mixture_names_its_domains(folder: Path) -> None:
    data = Mixture(domains={"all": Jsonl(path=str(folder)), "one": Jsonl(path=str(folder / "code.jsonl"), limit=1)})
    assert texts(data) == {"all": ["c1", "c2", "c3", "p1"], "one": ["c1"]}
    assert {example.domain for example in data.domains()["all"]} == {"all"}
    assert length_hint(data.domains()["all"]) == 4


def test_a_mixture_is_its_names_and_parts(folder: Path) -> None:
    code, prose = (Jsonl(path=str(folder / name)) for name in ("code.jsonl", "prose.train.jsonl"))
    prints = [
        Mixture(domains=d).fingerprint() for d in ({"a": code}, {"b": code}, {"a": prose}, {"a": code, "b": prose})
    ]
    assert len(set(prints)) == 4
    assert Mixture(domains={"a": Jsonl(path=str(folder / "code.jsonl"))}).fingerprint() == prints[0]


def test_a_mixture_passes_on_what_its_parts_drop(tmp_path: Path) -> None:
    file = write(tmp_path / "code.jsonl", "{", {"text": "a"})
    data = Mixture(domains={"code": Jsonl(path=str(file), max_bad_fraction=0.5)})
    assert texts(data) == {"code": ["a"]}
    assert data.max_bad_fraction == 0.5
    assert data.bad_rows() == {f"{file}:1": "broken JSON"}


@pytest.mark.parametrize("domains", [{}, {"a/b": None}])
def test_a_mixture_needs_names(domains: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="domain"):
        Mixture(domains=domains)


@pytest.fixture
def parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    datasets.disable_progress_bars()
    rows = {"question": ["q1", "q2", "q3"], "answer": ["a1", "a2", "a3"], "topic": ["x", "y", "x"], "id": [1, 2, 3]}
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "set" / "train.parquet")
    return tmp_path / "set"


COLUMNS = {"prompt": "question", "response": "answer"}


def test_a_hub_data_set_is_read_with_its_columns(parquet: Path) -> None:
    (rows,) = Hub(path=str(parquet), columns=COLUMNS).domains().values()
    first = next(iter(rows))
    assert (first.prompt, first.response, first.domain, first.meta) == ("q1", "a1", "set", {"topic": "x", "id": 1})
    assert first.where == f"{parquet}[train]:0"


def test_a_hub_data_set_has_domains_by_column_and_limits(parquet: Path) -> None:
    data = Hub(path=str(parquet), columns={**COLUMNS, "domain": "topic"})
    assert {name: [row.prompt for row in rows] for name, rows in data.domains().items()} == {
        "x": ["q1", "q3"],
        "y": ["q2"],
    }
    limited = Hub(path=str(parquet), columns=COLUMNS, domain="mine", limit=1)
    assert {name: len(list(rows)) for name, rows in limited.domains().items()} == {"mine": 1}


def test_a_hub_fingerprint_is_of_the_content(parquet: Path, tmp_path: Path) -> None:
    import datasets

    before = Hub(path=str(parquet), domain="d").fingerprint()
    rows = datasets.load_dataset(str(parquet), split="train")
    (tmp_path / "json").mkdir()
    rows.to_json(tmp_path / "json" / "train.jsonl")  # the same table in another format
    assert Hub(path=str(tmp_path / "json"), domain="d").fingerprint() == before
    (tmp_path / "changed").mkdir()
    rows.map(lambda row: {"answer": row["answer"] + "!"}).to_parquet(tmp_path / "changed" / "train.parquet")
    assert Hub(path=str(tmp_path / "changed"), domain="d").fingerprint() != before


def test_a_missing_hub_column_and_a_missing_data_set_are_sentences(parquet: Path, tmp_path: Path) -> None:
    (rows,) = Hub(path=str(parquet), columns={"prompt": "Question", "response": "answer"}).domains().values()
    with pytest.raises(ConfigError, match=r"\[train\]:0: there is no column Question; .*did you mean question"):
        list(rows)
    with pytest.raises(ConfigError, match=r"cannot be loaded .*data.split=test"):
        Hub(path=str(parquet), split="test").domains()
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ConfigError, match="cannot be loaded"):
        Hub(path=str(tmp_path / "nothing")).domains()
