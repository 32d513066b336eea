"""Retrieval: the k best documents of a file, as passages or demonstrations: BM25 (Lù 2024, bm25s, arXiv:2407.03618) or
embeddings (Karpukhin et al. 2020, DPR, arXiv:2004.04906)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from kdcli.api import Desk, Example, Transform
from kdcli.augmentation import _embedding
from kdcli.augmentation._sifting import batches, words
from kdcli.errors import ConfigError
from kdcli.store import paths
from kdcli.store.content import file_hash
from kdcli.store.examples import BadRow, parse_line, read_lines
from kdcli.text.prompt import rendered, template, variables

TEXT = ("text", "content", "contents", "passage", "document")  # columns that a passage may stand in, the first is it
WHERE = "augmentation: retrieve"
Scores = npt.NDArray[np.float32]


class Retrieve(Transform):
    """Adds `meta.passages` ([{text, id, title, score}]) or `meta.demos` ([{prompt, response, id, score}]) to each row.

    Documents are the lines of a text file, or JSON lines with `text` (for demos: `prompt` and `response`) and perhaps
    `id` and `title`. The file is read once and held. A document with the row's own text is left out (`exclude_self`),
    and with bm25 one that shares no word with the query, so there may be fewer than `k`. Best first, equal scores in
    the file's order. Each row has its own, whatever its group; equal queries find the same.
    """

    def __init__(
        self,
        *,
        documents: str,
        k: int = 3,
        method: Literal["bm25", "embedding"] = "bm25",
        model: str | None = None,
        query: str = "{{ prompt }}",
        into: Literal["passages", "demos"] = "passages",
        exclude_self: bool = True,
    ) -> None:
        if k < 1:
            raise ConfigError(f"{WHERE}.k is {k}; give 1 or more")
        if model is not None and method == "bm25":
            raise ConfigError(f"{WHERE}.model is read by method=embedding, and the method is bm25")
        self.documents = documents
        self.k = k
        self.method = method
        self.model = model or "tfidf"
        self.query = template(query, where=f"{WHERE}.query")
        self.into = into
        self.exclude_self = exclude_self

    def fingerprint(self) -> str:
        model = _embedding.fingerprint(self.model) if self.method == "embedding" else ""
        return f"{file_hash(self._file())} {model}"

    def open(self, desk: Desk) -> None:
        super().open(desk)
        self._found = list(_documents(self._file(), self.into))
        if not self._found:
            raise ConfigError(f"{WHERE}.documents: {self.documents} holds no document")
        texts = [str(document["text" if self.into == "passages" else "prompt"]) for document in self._found]
        titles = [f"{document['title']}\n" if document.get("title") else "" for document in self._found]
        self._own = [words(text) for text in texts]
        searched = [title + text for title, text in zip(titles, texts, strict=True)]
        self._scores = _bm25(searched) if self.method == "bm25" else _embedded(searched, self.model)

    def __call__(self, examples: Iterable[Example]) -> Iterator[Example]:
        for block in batches(examples):
            asked: list[tuple[Example, str]] = []
            for example in block:
                try:
                    asked.append((example, rendered(self.query, variables(example), f"{WHERE}.query")))
                except BadRow as error:
                    self.desk.aside(example, error.reason, str(error))
            scores = self._scores([query for _, query in asked])
            for (example, _), row in zip(asked, scores, strict=True):
                yield replace(example, meta={**example.meta, self.into: self._best(example, row)})

    def _best(self, example: Example, scores: Scores) -> list[dict[str, Any]]:
        own = (example.text, example.prompt, example.response) if self.exclude_self else ()
        same = [words(text) for text in own if text]
        best: list[dict[str, Any]] = []
        for number in np.argsort(-scores, kind="stable"):
            score = float(scores[number])
            if len(best) == self.k or (self.method == "bm25" and score <= 0):
                break
            if self._own[number] not in same:
                best.append({**self._found[number], "score": round(score, 6)})
        return best

    def _file(self) -> Path:
        file = paths.resolve(self.documents)
        if not file.is_file():
            raise ConfigError(f"{WHERE}.documents: {self.documents} is no file")
        return file


def _documents(file: Path, into: str) -> Iterator[dict[str, Any]]:
    for where, line in read_lines(file):
        if not line.strip():
            continue
        number = where.rpartition(":")[2]
        try:
            if file.suffix == ".txt":
                row: Mapping[str, Any] = {"text": line.decode("utf-8").strip()}
            else:
                row = parse_line(line)
        except UnicodeDecodeError:
            raise ConfigError(f"{where}: is not UTF-8; save the file as UTF-8") from None
        except BadRow as error:
            raise ConfigError(f"{where}: {error}") from None
        named = {"id": str(row.get("id", number))} | ({"title": str(row["title"])} if row.get("title") else {})
        if into == "passages":
            text = next((row[name] for name in TEXT if isinstance(row.get(name), str)), None)
            if text is None:
                raise ConfigError(f"{where}: a document needs `text`; its columns are {', '.join(row)}")
            yield {"text": text} | named
        else:
            missing = [name for name in ("prompt", "response") if not isinstance(row.get(name), str)]
            if missing:
                raise ConfigError(f"{where}: a demonstration needs {missing[0]}; its columns are {', '.join(row)}")
            yield {"prompt": row["prompt"], "response": row["response"]} | named


def _bm25(texts: Sequence[str]) -> Callable[[Sequence[str]], Iterator[Scores]]:
    try:
        import bm25s
    except ImportError:
        raise ConfigError(f'{WHERE}: method=bm25 needs bm25s: `pip install "kdcli[augment]"`') from None
    index: Any = bm25s.BM25()
    # A document without words would have none of the index's: a word that no query has stands for it.
    index.index([words(text) or ["\0"] for text in texts], show_progress=False)

    def scores(queries: Sequence[str]) -> Iterator[Scores]:
        for query in queries:
            known = [word for word in words(query) if word in index.vocab_dict]
            yield index.get_scores(known) if known else np.zeros(len(texts), dtype=np.float32)

    return scores


def _embedded(texts: Sequence[str], model: str) -> Callable[[Sequence[str]], Iterator[Scores]]:
    """Cosine similarity. TF-IDF is fitted on the documents, so that a score does not depend on the other queries."""
    encode = _embedding.fitted(texts) if model == "tfidf" else _embedding.encoder(model)
    documents = encode(texts)

    def scores(queries: Sequence[str]) -> Iterator[Scores]:
        yield from (encode(queries) @ documents.T if queries else ())

    return scores
