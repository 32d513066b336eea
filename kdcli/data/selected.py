"""The examples of another source that a file of scores ranks first: difference sampling, and stages of difficulty."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import xxhash

from kdcli.api import Data, Example
from kdcli.errors import ConfigError
from kdcli.store import paths
from kdcli.store.content import file_hash
from kdcli.store.examples import content_key

By = Literal["difference", "student", "teacher", "score"]
Place = tuple[str, str]  # domain, key of the content

FUSION = 60.0  # of reciprocal ranks: 1 / (60 + rank), POCL, tools/rank.py


class Selected(Data):
    """Keeps the share `keep` of the rows of `data`, the first by `by` from the `largest` (or `smallest`) on.

    `scores` is what `evaluation=row_scores` wrote about the same rows; `by` is one of its columns per target
    (`per: example`: summed over the example, as log p(x) is), or `score`, the rows' own. Several of them are fused by
    their ranks: sum 1 / (60 + rank). Equal rows are kept or left out together, ties go to the earlier row, and kept
    rows stay in the data's order.

    * `by: difference`, `keep: 0.5` is MiniPLM's difference sampling (arXiv:2410.17215): what a large teacher finds
      likelier than a small reference model does. Its file is of `kdcli evaluate` with the reference as student.
    * `by: student`, `order: smallest`, `stages: 4`, `stage: k` is the k-th of POCL's growing prefixes from easy to
      hard (arXiv:2506.05695): the share keep x k / 4. A run is of one stage; the next begins with the student of the
      last.

    The share is of all rows together, or of each domain (`per_domain`). Raises ConfigError for rows that have no score
    (up to the share `max_missing` of them is left out instead), and for a domain of which nothing is kept.
    """

    def __init__(
        self,
        *,
        data: Data,
        scores: str,
        by: By | Sequence[By] = "difference",
        per: Literal["target", "example"] = "target",
        order: Literal["largest", "smallest"] = "largest",
        keep: float = 0.5,
        per_domain: bool = False,
        stages: int = 1,
        stage: int = 1,
        max_missing: float = 0.0,
    ) -> None:
        if not 0 < keep <= 1:
            raise ConfigError(f"data.keep is {keep}; give a share above 0, at most 1")
        if stages < 1 or not 1 <= stage <= stages:
            raise ConfigError(f"data.stage is {stage} of data.stages={stages}; stages count from 1 to data.stages")
        if not 0 <= max_missing < 1:
            raise ConfigError(f"data.max_missing is {max_missing}; give a share from 0 to below 1")
        self.data = data
        self.file = paths.resolve(scores)
        self.scores = scores
        self.by: list[str] = [by] if isinstance(by, str) else list(by)
        self.per = per
        self.order = order
        self.keep = keep
        self.per_domain = per_domain
        self.stages = stages
        self.stage = stage
        self.max_missing = max_missing
        self.max_bad_fraction = data.max_bad_fraction
        if not self.by:
            raise ConfigError("data.by is empty; name difference, student, teacher or score")
        if not self.file.is_file():
            raise ConfigError(f"data.scores: there is no file {scores}; `evaluation=row_scores` writes one")

    def domains(self) -> dict[str, Iterable[Example]]:
        kept = self._kept
        parts = self.data.domains()
        counts = {name: sum(rows for (domain, _), rows in kept.items() if domain == name) for name in parts}
        for name, count in counts.items():
            if not count:
                raise ConfigError(
                    f"data.keep: none of the rows of domain {name} is kept; set data.per_domain=true, or a larger share"
                )
        return {name: _Rows(name, part, kept, counts[name]) for name, part in parts.items()}

    def fingerprint(self) -> str:
        settings = (
            self.by, self.per, self.order, self.keep, self.per_domain, self.stages, self.stage, self.max_missing
        )  # fmt: skip
        return xxhash.xxh3_128_hexdigest(repr((self.data.fingerprint(), self._hash, settings)).encode())

    def bad_rows(self) -> dict[str, str]:
        return self.data.bad_rows()

    @cached_property
    def _hash(self) -> str:
        return file_hash(self.file)

    @cached_property
    def _kept(self) -> dict[Place, int]:
        """The rows that are kept -> how often the data have them."""
        known = _read(self.file, self.scores, self.per)
        count: dict[Place, int] = {}
        values: dict[Place, list[float]] = {}
        missing, bare = 0, ""
        for name, rows in self.data.domains().items():
            for example in rows:
                place = (name, content_key(example))
                own = {**known.get(place, {}), "score": example.score}
                found = [value for by in self.by if (value := own.get(by)) is not None]
                if len(found) < len(self.by):
                    missing += 1
                    bare = bare or example.where
                    continue
                count[place] = count.get(place, 0) + 1
                values[place] = found
        self._refuse(missing, missing + sum(count.values()), bare)
        return self._first(count, values)

    def _refuse(self, missing: int, rows: int, where: str) -> None:
        if missing > self.max_missing * rows:
            raise ConfigError(
                f"data.scores: {missing} of {rows} rows have no {' and '.join(self.by)} in {self.scores} (the first is "
                f"{where or 'not named'}); score these data with `evaluation=row_scores`, and a teacher if it is "
                "needed, or raise data.max_missing"
            )

    def _first(self, count: Mapping[Place, int], values: Mapping[Place, list[float]]) -> dict[Place, int]:
        """The share keep x stage / stages of the rows: at least one, rounded to the nearest."""
        ranked = self._ranked(values)
        groups: dict[str, list[Place]] = {}
        for place in ranked:
            groups.setdefault(place[0] if self.per_domain else "", []).append(place)
        kept: dict[Place, int] = {}
        for group in groups.values():
            left = max(1, round(self.keep * self.stage / self.stages * sum(count[place] for place in group)))
            for place in group:
                if left <= 0:
                    break
                kept[place] = count[place]
                left -= count[place]
        return kept

    def _ranked(self, values: Mapping[Place, list[float]]) -> list[Place]:
        """Rows from the first to the last; sorting is stable, so ties keep the data's order."""
        sign = -1.0 if self.order == "largest" else 1.0

        def sorted_by(value: Callable[[Place], float]) -> list[Place]:
            return sorted(values, key=value)

        if len(self.by) == 1:
            return sorted_by(lambda place: sign * values[place][0])
        fused = dict.fromkeys(values, 0.0)
        for column in range(len(self.by)):
            for rank, place in enumerate(sorted_by(lambda place, c=column: sign * values[place][c]), start=1):
                fused[place] += 1 / (FUSION + rank)
        return sorted_by(lambda place: -fused[place])


@dataclass(frozen=True)
class _Rows:
    """The rows of one domain that are kept, read anew by each iteration."""

    name: str
    rows: Iterable[Example]
    kept: Mapping[Place, int]
    count: int

    def __length_hint__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Example]:
        return (example for example in self.rows if (self.name, content_key(example)) in self.kept)


def _read(file: Path, name: str, per: str) -> dict[Place, dict[str, float | None]]:
    """Domain and key -> the columns of a file of scores, per target or per example; what is not finite is None."""
    known: dict[Place, dict[str, float | None]] = {}
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                divide = 1.0 if per == "example" else float(row["tokens"])
                columns = {key: _over(row[key], divide) for key in ("difference", "student", "teacher")}
                known[str(row["domain"]), str(row["key"])] = columns
            except (ValueError, KeyError, TypeError, ZeroDivisionError):
                raise ConfigError(
                    f"data.scores: {name}:{number} is no line of `evaluation=row_scores`; give the file that it wrote"
                ) from None
    return known


def _over(value: Any, divide: float) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value) / divide
