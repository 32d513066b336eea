"""A diverse share of the rows: k-centre greedy (Sener and Savarese 2018, arXiv:1708.00489), or evenly from clusters."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Literal

import numpy as np
import numpy.typing as npt

from kdcli.api import Example, Transform
from kdcli.augmentation import _embedding
from kdcli.augmentation._asking import groups
from kdcli.augmentation._embedding import Vectors
from kdcli.augmentation._sifting import Field, Spool, batches, lacking, text_of
from kdcli.errors import ConfigError

WHERE = "augmentation: diverse"
ROUNDS = 20  # of k-means, at most


class Diverse(Transform):
    """Keeps `count` rows, or a `share` of them, in their order; others are set aside.

    `k_centre` begins with the row nearest to the mean and takes the row farthest (by cosine) from all taken so far.
    `cluster` splits the rows by k-means into sqrt(rows / 2) clusters and takes from each in turn, those nearest to its
    centre first. Rows of a group are one: their first row is looked at, they count once and stay or leave together.
    Rows wait in a file; memory holds a vector each (2 KB with tfidf).
    """

    def __init__(
        self,
        *,
        count: int | None = None,
        share: float | None = None,
        method: Literal["k_centre", "cluster"] = "k_centre",
        embed: str = "tfidf",
        field: Field = "prompt",
    ) -> None:
        if (count is None) == (share is None):
            raise ConfigError(f"{WHERE}: give either count (of rows) or share (of the rows, from 0 to 1)")
        if (count is not None and count < 1) or (share is not None and not 0 < share <= 1):
            raise ConfigError(f"{WHERE}: count is 1 or more, share above 0 and at most 1; not {count or share}")
        self.count = count
        self.share = share
        self.method = method
        self.embed = embed
        self.field: Field = field

    def fingerprint(self) -> str:
        return _embedding.fingerprint(self.embed)

    def __call__(self, examples: Iterable[Example]) -> Iterator[Example]:
        if self.desk.rehearsal:
            yield from examples
            return
        spool = Spool(self.desk.folder)
        encode = _embedding.encoder(self.embed)  # before rows are read: a folder that is none is told of at once
        passing = self._looked_at(spool.fill(examples))
        if self.embed == "tfidf":
            encode = _embedding.fitted(passing)
        else:
            deque(passing, maxlen=0)
        vectors = np.concatenate([encode(block) for block in batches(self._looked_at(spool))] or [encode([])])
        wanted = self.count if self.count is not None else round((self.share or 0) * len(vectors))
        taken = set(self._taken(vectors, min(wanted, len(vectors))).tolist())
        number = -1
        for group in groups(spool):
            here = text_of(group[0], self.field) is not None
            number += here
            for example in group:
                if not here:
                    self.desk.aside(example, *lacking(self.field))
                elif number in taken:
                    yield example
                else:
                    self.desk.aside(example, "not among the diverse", f"{len(taken)} of {len(vectors)} are kept")
        spool.remove()

    def _looked_at(self, examples: Iterable[Example]) -> Iterator[str]:
        """The text of each group that has one."""
        texts = (text_of(group[0], self.field) for group in groups(examples))
        return (text for text in texts if text is not None)

    def _taken(self, vectors: Vectors, wanted: int) -> npt.NDArray[np.intp]:
        if wanted == 0:
            return np.zeros(0, dtype=np.intp)
        if self.method == "k_centre":
            return k_centre(vectors, wanted)
        clusters = max(1, min(wanted, round((len(vectors) / 2) ** 0.5)))
        return balanced(vectors, wanted, clusters, np.random.default_rng(self.desk.seed("clusters")))


def k_centre(vectors: Vectors, wanted: int) -> npt.NDArray[np.intp]:
    """Indices of `wanted` of the rows [N, D] in the order in which they are taken; ties go to the first.

    The greatest distance of a row to its nearest taken one is at most twice the least possible, for distances that
    keep the triangle inequality; here |a - b|^2 = 2 - 2 a b, whose order is that of |a - b|.
    """
    taken = np.empty(wanted, dtype=np.intp)
    free = np.full(len(vectors), np.inf, dtype=np.float32)
    at = int(np.argmax(vectors @ vectors.mean(axis=0)))
    for number in range(wanted):
        taken[number] = at
        free = np.minimum(free, 1 - vectors @ vectors[at])
        free[at] = -np.inf
        at = int(np.argmax(free))
    return taken


def balanced(vectors: Vectors, wanted: int, clusters: int, draw: np.random.Generator) -> npt.NDArray[np.intp]:
    """Indices of `wanted` of the rows [N, D], one of each cluster in turn, those nearest to its centre first."""
    member, nearness = _clusters(vectors, clusters, draw)
    order = np.lexsort((np.arange(len(vectors)), -nearness, member))
    places = np.arange(len(order)) - np.searchsorted(member[order], member[order])  # 0, 1, 2, … within a cluster
    return order[np.lexsort((member[order], places))][:wanted]


def _clusters(
    vectors: Vectors, clusters: int, draw: np.random.Generator
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.float32]]:
    """Spherical k-means from k-means++ centres: of each row its cluster, and cosine to the centre."""
    centres = vectors[_spread(vectors, clusters, draw)].copy()
    member = np.full(len(vectors), -1, dtype=np.intp)
    for _ in range(ROUNDS):
        nearest = np.argmax(vectors @ centres.T, axis=1)
        if (nearest == member).all():
            break
        member = nearest
        for number in np.unique(member):
            total = vectors[member == number].sum(axis=0)
            centres[number] = total / max(float(np.linalg.norm(total)), 1e-12)
    return member, np.einsum("nd,nd->n", vectors, centres[member])


def _spread(vectors: Vectors, clusters: int, draw: np.random.Generator) -> list[int]:
    """k-means++: each next centre drawn with a probability that grows with its squared distance to those there are."""
    chosen = [int(draw.integers(len(vectors)))]
    squared = np.full(len(vectors), np.inf)
    while len(chosen) < clusters:
        squared = np.minimum(squared, np.maximum(2 - 2 * (vectors @ vectors[chosen[-1]]).astype(np.float64), 0))
        total = squared.sum()
        if total <= 1e-9:  # all rows are among the centres
            break
        chosen.append(int(np.searchsorted(np.cumsum(squared), draw.random() * total, side="right")))
    return chosen
