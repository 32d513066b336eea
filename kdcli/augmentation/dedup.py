"""Deduplication, the first of similar rows staying: exact, MinHash, ROUGE-L (Self-Instruct, arXiv:2212.10560), or
embeddings (SemDeDup, arXiv:2303.09540)."""

from __future__ import annotations

import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import xxhash

from kdcli.api import Example, Transform
from kdcli.augmentation import _embedding
from kdcli.augmentation._asking import groups
from kdcli.augmentation._minhash import MinHash
from kdcli.augmentation._rouge import RougeL
from kdcli.augmentation._sifting import Field, lacking, text_of
from kdcli.augmentation._table import Records, Tags
from kdcli.errors import ConfigError

T = TypeVar("T")
BLOCK = 256  # rows whose signatures or vectors are computed together
METHODS = ("exact", "minhash", "rouge_l", "embedding")


class Dedup(Transform):
    """Sets a row aside that is like a kept row before it: similarity >= `threshold`.

    What later rows are never changes what became of earlier ones. With field=prompt the rows of a group, which share
    it, are decided by their first and leave together; with any other field each row is decided for itself. Memory:
    none per row for exact and minhash, whose indices lie in files; the words of kept rows for rouge_l; their vectors
    for embedding.
    """

    def __init__(
        self,
        *,
        method: Literal["exact", "minhash", "rouge_l", "embedding"] = "exact",
        threshold: float = 0.7,
        field: Field = "prompt",
        within: Literal["domain"] | None = None,
        model: str | None = None,
    ) -> None:
        if method not in METHODS:
            raise ConfigError(f"augmentation: dedup.method is {method}; choose one of {', '.join(METHODS)}")
        if not 0 < threshold <= 1:
            raise ConfigError(f"augmentation: dedup.threshold is {threshold}; give a similarity above 0, up to 1")
        if model is not None and method != "embedding":
            raise ConfigError(f"augmentation: dedup.model is read by method=embedding, and the method is {method}")
        if model == "tfidf":
            raise ConfigError(
                "augmentation: dedup.model=tfidf weights words by all rows, so later rows would change what becomes of "
                "earlier ones; take model=hashing, or the folder of an encoder"
            )
        self.method = method
        self.threshold = threshold
        self.field: Field = field
        self.within = within
        self.model = model or "hashing"

    def fingerprint(self) -> str:
        return _embedding.fingerprint(self.model) if self.method == "embedding" else ""

    def __call__(self, examples: Iterable[Example]) -> Iterator[Example]:
        if self.desk.rehearsal:
            yield from examples
            return
        index = self._index()
        try:
            yield from self._sifted(examples, index)
        finally:
            index.close()

    def _sifted(self, examples: Iterable[Example], index: _Index) -> Iterator[Example]:
        held: list[tuple[list[Example], str]] = []
        for unit in groups(examples) if self.field == "prompt" else ([example] for example in examples):
            text = text_of(unit[0], self.field)
            if text is not None:
                held.append((unit, text))
            if text is None or len(held) == BLOCK:
                yield from self._decided(index, held)
                held = []
            if text is None:
                for example in unit:
                    self.desk.aside(example, *lacking(self.field))
        yield from self._decided(index, held)

    def _decided(self, index: _Index, held: Sequence[tuple[list[Example], str]]) -> Iterator[Example]:
        scopes = [unit[0].domain if self.within == "domain" else "" for unit, _ in held]
        found = index.like([text for _, text in held], scopes)
        for (unit, _), similar in zip(held, found, strict=True):
            if similar is None:
                yield from unit
                continue
            number, similarity = similar
            for example in unit:
                self.desk.aside(
                    example,
                    "duplicate",
                    f"{self.field} is like that of kept {'prompt' if self.field == 'prompt' else 'row'} {number + 1} "
                    f"({self.method} similarity {similarity:.3f}, threshold {self.threshold})",
                )

    def _index(self) -> _Index:
        folder = self.desk.folder
        if self.method == "exact":
            return _Exact(folder)
        if self.method == "minhash":
            return _Near(folder, self.threshold)
        if self.method == "rouge_l":
            return _Rouge(self.threshold)
        return _Embedded(self.model, self.threshold)


Similar = tuple[int, float]  # number of the kept one, in order of being kept in its scope; similarity


class _Index(ABC):
    """Kept texts. `like` decides each of some texts in turn, and keeps those that are like none."""

    @abstractmethod
    def like(self, texts: Sequence[str], scopes: Sequence[str]) -> Iterator[Similar | None]: ...

    def close(self) -> None: ...


class _Exact(_Index):
    """Equal up to case, Unicode form and white space."""

    def __init__(self, folder: Path) -> None:
        self._tags = Tags(folder / "tags.bin")
        self._digests = Records(folder / "digests.bin", 16)

    def like(self, texts: Sequence[str], scopes: Sequence[str]) -> Iterator[Similar | None]:
        for text, scope in zip(texts, scopes, strict=True):
            digest = xxhash.xxh3_128_digest(f"{scope}\0{normal(text)}".encode())
            tag = int.from_bytes(digest[:4], "little")
            same = next((row for row in self._tags.find(tag) if self._digests.get(row) == digest), None)
            if same is None:
                self._tags.add(tag, self._digests.add(digest))
            yield None if same is None else (same, 1.0)

    def close(self) -> None:
        self._tags.close()
        self._digests.close()


class _Near(_Index):
    def __init__(self, folder: Path, threshold: float) -> None:
        self._minhash = MinHash(folder, threshold)

    def like(self, texts: Sequence[str], scopes: Sequence[str]) -> Iterator[Similar | None]:
        if not texts:
            return
        hashed = [xxhash.xxh3_64_intdigest(scope.encode()) for scope in scopes]
        signatures = self._minhash.signatures(texts)
        tags = self._minhash.tags(signatures, hashed).tolist()
        for signature, bands, scope in zip(signatures, tags, hashed, strict=True):
            similar = self._minhash.find(signature, bands, scope)
            if similar is None:
                self._minhash.add(signature, bands, scope)
            yield similar

    def close(self) -> None:
        self._minhash.close()


class _Rouge(_Index):
    def __init__(self, threshold: float) -> None:
        self._scopes: _Scopes[RougeL] = _Scopes(lambda: RougeL(threshold))

    def like(self, texts: Sequence[str], scopes: Sequence[str]) -> Iterator[Similar | None]:
        for text, scope in zip(texts, scopes, strict=True):
            rouge = self._scopes[scope]
            similar = rouge.find(text)
            if similar is None:
                rouge.add(text)
            yield similar


class _Embedded(_Index):
    """Cosine similarity."""

    def __init__(self, model: str, threshold: float) -> None:
        self._encode = _embedding.encoder(model)
        self._threshold = threshold
        self._scopes: _Scopes[_Vectors] = _Scopes(_Vectors)

    def like(self, texts: Sequence[str], scopes: Sequence[str]) -> Iterator[Similar | None]:
        if not texts:
            return
        for vector, scope in zip(self._encode(texts), scopes, strict=True):
            kept = self._scopes[scope]
            similar = kept.find(vector, self._threshold)
            if similar is None:
                kept.add(vector)
            yield similar


class _Vectors:
    """A matrix that grows by doubling."""

    def __init__(self) -> None:
        self._rows = np.zeros((0, 0), dtype=np.float32)
        self._count = 0

    def find(self, vector: np.ndarray, threshold: float) -> Similar | None:
        if not self._count:
            return None
        similarities = self._rows[: self._count] @ vector
        best = int(np.argmax(similarities))
        return (best, float(similarities[best])) if similarities[best] >= threshold - 1e-6 else None

    def add(self, vector: np.ndarray) -> None:
        if self._count == len(self._rows):
            larger = np.zeros((max(64, 2 * self._count), len(vector)), dtype=np.float32)
            larger[: self._count] = self._rows.reshape(self._count, len(vector))
            self._rows = larger
        self._rows[self._count] = vector
        self._count += 1


class _Scopes(dict[str, T]):
    def __init__(self, make: Callable[[], T]) -> None:
        super().__init__()
        self._make = make

    def __missing__(self, key: str) -> T:
        self[key] = self._make()
        return self[key]


def normal(text: str) -> str:
    """What texts that are equal for `exact` have in common."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
