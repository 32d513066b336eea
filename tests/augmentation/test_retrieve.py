"""Retrieval: the best documents, never the row itself; a row's documents do not depend on the other rows."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdcli.api import Example
from kdcli.augmentation._embedding import DIMENSIONS, embed, encoder, fingerprint
from kdcli.augmentation.retrieve import Retrieve
from kdcli.errors import ConfigError
from tests.desks import FakeDesk, run

TEACHER = "recipes://data/tiny_teacher"
DOCUMENTS = [
    "The cat sat on the mat.",
    "Dogs bark loudly at night, and cats do not.",
    "Paris is the capital of France.",
    "The capital of Italy is Rome, the capital of Spain is Madrid.",
    "!?",
]


@pytest.fixture
def documents(tmp_path: Path) -> str:
    file = tmp_path / "documents.jsonl"
    rows = [{"text": text, "id": f"d{i}", "title": "Cities" if i == 3 else None} for i, text in enumerate(DOCUMENTS)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def ids(row: Example) -> list[str]:
    return [passage["id"] for passage in row.meta["passages"]]


@pytest.mark.parametrize("method", ["bm25", "embedding"])
def test_the_best_stand_first_and_the_row_s_own_text_is_left_out(method: Any, documents: str) -> None:
    rows = [Example(prompt="What is the capital of France?"), Example(prompt="the cat sat on the mat")]
    first, second = run(Retrieve(documents=documents, method=method, k=2), rows)
    assert ids(first)[0] == "d2"
    assert ids(first)[1] == "d3"
    scores = [passage["score"] for passage in first.meta["passages"]]
    assert scores == sorted(scores, reverse=True)
    assert "d0" not in ids(second)
    (again,) = run(Retrieve(documents=documents, method=method, exclude_self=False), rows[1:])
    assert ids(again)[0] == "d0"
    assert first.prompt == rows[0].prompt


@pytest.mark.parametrize("method", ["bm25", "embedding"])
def test_other_rows_do_not_matter(method: Any, documents: str) -> None:
    rows = [Example(prompt=text) for text in ("capital of Spain", "dogs at night", "zebra", "cats")] * 80
    step = Retrieve(documents=documents, method=method)
    together = run(step, rows)
    assert together[:4] == [run(step, [row])[0] for row in rows[:4]]
    assert together[:4] == together[-4:]


def test_bm25_finds_nothing_where_no_word_is_shared(documents: str) -> None:
    (row,) = run(Retrieve(documents=documents), [Example(prompt="zebra")])
    assert row.meta["passages"] == []


def test_titles_are_searched_and_kept(documents: str) -> None:
    (row,) = run(Retrieve(documents=documents, k=1), [Example(prompt="cities")])
    assert row.meta["passages"][0]["title"] == "Cities"
    assert row.meta["passages"][0]["text"] == DOCUMENTS[3]


def test_bm25_scores_are_the_formula_s(tmp_path: Path) -> None:
    """Two documents "a b" and "a c c": query c has idf = ln(1 + (2 - 1 + 0.5) / (1 + 0.5)) = ln 2, tf 2, length 3 of
    2.5 on average: ln 2 * 2 / (2 + 1.5 (1 - 0.75 + 0.75 * 3 / 2.5)) (Lucene's form, without the factor k1 + 1)."""
    (tmp_path / "two.txt").write_text("a b\na c c\n")
    (row,) = run(Retrieve(documents=str(tmp_path / "two.txt")), [Example(prompt="c")])
    (passage,) = row.meta["passages"]
    assert passage["id"] == "2"
    assert passage["score"] == pytest.approx(np.log(2) * 2 / (2 + 1.5 * (0.25 + 0.75 * 3 / 2.5)), rel=1e-5)


def test_demonstrations_are_prompts_with_responses(tmp_path: Path) -> None:
    file = tmp_path / "demos.jsonl"
    pairs = [("name a river", "Rhine"), ("name a tree", "oak"), ("add 2 and 3", "5")]
    file.write_text("".join(json.dumps({"prompt": p, "response": r}) + "\n" for p, r in pairs))
    (row,) = run(Retrieve(documents=str(file), into="demos", k=1), [Example(prompt="name a river")])
    (demo,) = row.meta["demos"]
    assert (demo["prompt"], demo["response"]) == ("name a tree", "oak")
    file.write_text('{"prompt": "x"}\n')
    with pytest.raises(ConfigError, match=r"demos\.jsonl:1: .* needs response"):
        run(Retrieve(documents=str(file), into="demos"), [])


def test_the_query_is_a_template_and_what_it_lacks_is_said(documents: str) -> None:
    step = Retrieve(documents=documents, query="{{ meta.topic }}", k=1)
    rows = run(step, [Example(prompt="x", meta={"topic": "Rome"}), Example(prompt="y")])
    assert [ids(row) for row in rows] == [["d3"]]
    assert isinstance(step.desk, FakeDesk)
    assert step.desk.reasons == ["lacks a field"]


def test_a_rehearsal_retrieves_too(documents: str) -> None:
    (row,) = run(Retrieve(documents=documents), [Example(prompt="Rome")], rehearsal=True)
    assert ids(row)[0] == "d3"


def test_the_documents_decide_the_fingerprint(documents: str) -> None:
    step = Retrieve(documents=documents)
    before = step.fingerprint()
    Path(documents).write_text('{"text": "other"}\n')
    assert step.fingerprint() != before


@pytest.mark.parametrize(
    ("content", "settings", "says"),
    [
        ("", {}, "holds no document"),
        ('{"title": "x"}\n', {}, "needs `text`"),
        ("{broken\n", {}, r"documents\.jsonl:1"),
        ('{"text": "x"}\n', dict(k=0), "1 or more"),
        ('{"text": "x"}\n', dict(model="x"), "method=embedding"),
        ('{"text": "x"}\n', dict(method="embedding", model="no/folder"), "no folder of an encoder"),
        ('{"text": "x"}\n', dict(query="{{ promt }}"), "promt"),
    ],
)
def test_bad_input_names_the_way_out(content: str, settings: dict[str, Any], says: str, tmp_path: Path) -> None:
    file = tmp_path / "documents.jsonl"
    file.write_text(content)
    with pytest.raises(ConfigError, match=says):
        run(Retrieve(documents=str(file), **settings), [])


def test_a_missing_package_names_the_extra(documents: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(ConfigError, match=r"kdcli\[augment\]"):
        run(Retrieve(documents=documents), [])


def test_a_missing_sentence_transformers_names_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "modules.json").write_text("[]")
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ConfigError, match=r"kdcli\[embed\]"):
        embed(["x"], str(tmp_path))


# ------------------------------------------------------------------------------------------------- vectors


@pytest.mark.parametrize("model", ["tfidf", "hashing", TEACHER])
def test_vectors_are_unit_rows_and_equal_texts_are_nearest(model: str) -> None:
    texts = [*DOCUMENTS[:4], DOCUMENTS[1]]
    vectors = embed(texts, model)
    assert vectors.dtype == np.float32 and len(vectors) == 5
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert vectors[1] @ vectors[4] == pytest.approx(1, abs=1e-5)
    assert max(float(vectors[1] @ vectors[i]) for i in (0, 2, 3)) < 0.999


def test_vectors_of_a_model_do_not_depend_on_the_batch() -> None:
    encode = encoder(TEACHER)
    alone = np.concatenate([encode([text]) for text in DOCUMENTS])
    np.testing.assert_allclose(encode(DOCUMENTS), alone, atol=1e-5)
    assert fingerprint(TEACHER) != fingerprint("hashing")


def test_hashed_tf_idf_is_the_exact_one_up_to_its_error() -> None:
    """Against dense TF-IDF: the inner products of signed hashes are unbiased, with an error of about D^-1/2."""
    draw = np.random.default_rng(0)
    texts = [" ".join(f"w{i}" for i in draw.zipf(1.4, 60) % 500) for _ in range(40)]
    names = sorted({word for text in texts for word in text.split()})
    counts = np.array([[text.split().count(name) for name in names] for text in texts])
    idf = np.log((1 + len(texts)) / (1 + (counts > 0).sum(axis=0))) + 1
    dense = np.where(counts > 0, 1 + np.log(np.maximum(counts, 1)), 0) * idf
    dense /= np.linalg.norm(dense, axis=1, keepdims=True)
    vectors = embed(texts)
    off = (vectors @ vectors.T - dense @ dense.T)[~np.eye(len(texts), dtype=bool)]
    assert np.sqrt(np.mean(off**2)) < 2 / DIMENSIONS**0.5
