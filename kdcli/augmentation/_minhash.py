"""MinHash with banding: Broder 1997 (resemblance of documents), of which 16 bits are kept (Li and König 2010,
arXiv:0910.3349)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from kdcli.augmentation._sifting import words
from kdcli.augmentation._table import Records, Tags

HASHES = 128  # of a signature: an estimate of Jaccard similarity J is off by sqrt(J (1 - J) / 128), at most 0.044
SHINGLE = 3  # words in a row that make one element of a text's set
FOUND = 0.9  # least share of pairs at the threshold that banding must bring together
MIX = np.uint64(0x9E3779B97F4A7C15)


class MinHash:
    """Finds texts whose sets of word trigrams have an estimated Jaccard similarity of at least `threshold`.

    Signatures are cut into bands of r hashes; pairs that share a band are compared by their whole signatures. r is the
    largest for which a pair at the threshold shares a band with probability 1 - (1 - threshold^r)^(128 // r) >= 0.9.
    Signatures (256 bytes) and bands (16 to 32 bytes each) of what was added lie in files in `folder`.
    """

    def __init__(self, folder: Path, threshold: float) -> None:
        self.threshold = threshold
        self.rows = rows_of_a_band(threshold)
        self.bands = HASHES // self.rows
        self._signatures = Records(folder / "signatures.bin", 2 * HASHES + 8)
        self._tags = Tags(folder / "bands.bin")
        draws = np.frombuffer(b"".join(hashlib.sha256(b"kdcli minhash %d" % i).digest() for i in range(HASHES)), "<u8")
        self._multiply, self._add = draws[0::4] | np.uint64(1), draws[1::4]
        self._weights = draws[2::4] | np.uint64(1)  # of the hashes of a band

    def signatures(self, texts: Sequence[str]) -> npt.NDArray[np.uint16]:
        """[N, 128]."""
        found = [_word_hashes(text) for text in texts]
        sets = [_shingles(hashes) for hashes in found]
        starts = np.cumsum([0, *(len(one) for one in sets[:-1])]) if sets else np.zeros(0, dtype=np.int64)
        elements = np.concatenate(sets) if sets else np.zeros(0, dtype=np.uint64)
        out = np.empty((len(texts), HASHES), dtype=np.uint16)
        for i in range(HASHES):
            least = np.minimum.reduceat(elements * self._multiply[i] + self._add[i], starts)
            out[:, i] = (least ^ (least >> np.uint64(29))) & np.uint64(0xFFFF)
        return out

    def tags(self, signatures: npt.NDArray[np.uint16], scopes: Sequence[int]) -> npt.NDArray[np.uint64]:
        """[N, bands] 32-bit hashes of the bands; rows of other scopes have others."""
        used = self.bands * self.rows
        sums = (signatures[:, :used].astype(np.uint64) + np.uint64(1)) * self._weights[:used]
        sums = sums.reshape(len(signatures), self.bands, self.rows).sum(axis=2, dtype=np.uint64)
        numbers = np.arange(1, self.bands + 1, dtype=np.uint64) * MIX
        return _mixed(sums ^ numbers ^ np.array(scopes, dtype=np.uint64)[:, None]) >> np.uint64(32)

    def find(self, signature: npt.NDArray[np.uint16], tags: Sequence[int], scope: int) -> tuple[int, float] | None:
        """The row most like it among those added in its scope (the first of equals), if it reaches the threshold."""
        candidates = sorted({row for tag in tags for row in self._tags.find(tag)})
        best: tuple[int, float] | None = None
        for row in candidates:
            record = self._signatures.get(row)
            if int.from_bytes(record[-8:], "little") != scope:
                continue
            equal = float(np.count_nonzero(np.frombuffer(record[:-8], dtype=np.uint16) == signature)) / HASHES
            if equal >= self.threshold and (best is None or equal > best[1]):
                best = row, equal
        return best

    def add(self, signature: npt.NDArray[np.uint16], tags: Sequence[int], scope: int) -> int:
        """Its row number."""
        row = self._signatures.add(signature.tobytes() + scope.to_bytes(8, "little"))
        for tag in tags:
            self._tags.add(tag, row)
        return row

    def close(self) -> None:
        self._signatures.close()
        self._tags.close()


def rows_of_a_band(threshold: float) -> int:
    """r, see MinHash."""
    fits = [r for r in range(1, 33) if 1 - (1 - threshold**r) ** (HASHES // r) >= FOUND]
    return max(fits, default=1)


def jaccard(first: str, second: str) -> float:
    """What is estimated: of the sets of word trigrams, |A and B| / |A or B|."""
    a, b = (set(_shingles(_word_hashes(text)).tolist()) for text in (first, second))
    return len(a & b) / len(a | b)


def _word_hashes(text: str) -> npt.NDArray[np.uint64]:
    found = words(text) or [text]  # of a text without words, itself
    return np.array([xxhash.xxh3_64_intdigest(word.encode()) for word in found], dtype=np.uint64)


def _shingles(hashes: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Hashes of the runs of 3 words; of a shorter text, of the whole."""
    size = min(SHINGLE, len(hashes))
    total = np.full(len(hashes) - size + 1, size, dtype=np.uint64)
    for i in range(size):
        total = _mixed(total + hashes[i : len(hashes) - size + 1 + i] + MIX)
    return total


def _mixed(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finalizer of splitmix64: every bit depends on every bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
