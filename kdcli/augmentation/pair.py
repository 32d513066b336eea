"""A preference pair per group, best against worst or a random other: Zephyr, Tunstall et al. 2023, arXiv:2310.16944."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from kdcli.api import Example, Transform
from kdcli.augmentation._asking import groups
from kdcli.augmentation._grouped import group_key
from kdcli.errors import ConfigError
from kdcli.store.examples import BadRow, content_key
from kdcli.text.prompt import Expression, variables


class Pair(Transform):
    """Each group becomes one row: prompt, chosen, rejected.

    `chosen`: `best` (highest score), or an expression over rows such as `meta.by == 'data'`, of whose rows the best is
    taken. `rejected`: `worst`, `random` (of those that are worse, by the run's seed), or an expression, of whose rows
    the worst is taken. Where both have scores, chosen must be above rejected, by `margin` at least, else the group is
    set aside; `keep_ties` keeps it. A rehearsal keeps every pair, since what it sees are no answers.
    """

    def __init__(
        self, *, chosen: str = "best", rejected: str = "worst", margin: float = 0.0, keep_ties: bool = False
    ) -> None:
        if margin < 0:
            raise ConfigError(f"augmentation: pair.margin is {margin}; give 0 or more")
        self.chosen = None if chosen == "best" else Expression(chosen, where="augmentation: pair.chosen")
        self.draws = rejected == "random"
        named = rejected not in ("worst", "random")
        self.rejected = Expression(rejected, where="augmentation: pair.rejected") if named else None
        self.margin = margin
        self.keep_ties = keep_ties

    def __call__(self, examples: Iterable[Example]) -> Iterator[Example]:
        for rows in groups(examples):
            try:
                yield self._paired(rows)
            except BadRow as error:
                self.desk.aside(rows[0], error.reason, str(error))

    def _paired(self, rows: Sequence[Example]) -> Example:
        answers = [row for row in rows if row.prompt is not None and row.response]
        if len(answers) < 2:
            raise BadRow("one answer only", f"the group has {len(answers)} rows with a response; a pair needs two")
        best = _best(
            self._among(answers, self.chosen, "chosen"), needed=self.chosen is None and not self.desk.rehearsal
        )
        others = [row for row in answers if row is not best]
        worst = self._worst(best, self._among(others, self.rejected, "rejected"))
        if not self.desk.rehearsal:
            self._check(best, worst)
        return preference(best, worst)

    def _among(self, rows: Sequence[Example], wanted: Expression | None, setting: str) -> Sequence[Example]:
        """The rows that an expression is true of."""
        if wanted is None:
            return rows
        found = [row for row in rows if wanted.holds(variables(row))]
        if not found and not self.desk.rehearsal:
            raise BadRow(f"none to be {setting}", f"no row of the group fits {wanted.source}")
        return found or rows

    def _worst(self, best: Example, rows: Sequence[Example]) -> Example:
        if not self.draws:
            return _best(
                rows, sign=-1, needed=self.rejected is None and self.chosen is None and not self.desk.rehearsal
            )
        worse = [row for row in rows if self.keep_ties or not self._tie(best, row)] or rows
        return worse[self.desk.seed(group_key(best), "rejected") % len(worse)]

    def _tie(self, best: Example, worst: Example) -> bool:
        if best.score is None or worst.score is None:
            return False
        above = best.score - worst.score
        return above <= 0 or above < self.margin

    def _check(self, best: Example, worst: Example) -> None:
        if best.response == worst.response:
            raise BadRow("equal answers", "chosen and rejected would be the same text")
        if self.margin and (best.score is None or worst.score is None):
            raise BadRow("no score", "a margin needs scores; put a step judge, compare or rank before this one")
        if self._tie(best, worst) and not self.keep_ties and best.score is not None and worst.score is not None:
            sentence = f"chosen has score {best.score:g}, rejected {worst.score:g}; margin is {self.margin:g}"
            raise BadRow("tie" if best.score >= worst.score else "chosen is worse", sentence)


def _best(rows: Sequence[Example], *, sign: int = 1, needed: bool = False) -> Example:
    """The row of the highest score (of the lowest with sign -1), the first among equals; without scores the first."""
    if needed and any(row.score is None for row in rows):
        raise BadRow("no score", "best and worst go by scores; put a step judge, compare or rank before this one")
    return max(rows, key=lambda row: float("-inf") if row.score is None else sign * row.score)


def preference(chosen: Example, rejected: Example) -> Example:
    """The pair as one row, of the provenance of both."""
    both = (chosen, rejected)
    meta: dict[str, Any] = {name: chosen.meta[name] for name in ("id", "source", "terms") if name in chosen.meta}
    found = (row.meta.get("license") for row in both)
    licences = sorted({str(one) for each in found if each for one in (each if isinstance(each, list) else [each])})
    if licences:
        meta["license"] = licences[0] if len(licences) == 1 else licences
    meta["parents"] = [content_key(row) for row in both]
    written: list[Mapping[str, Any]] = []
    for row in both:
        written += [entry for entry in row.meta.get("written", ()) if entry not in written]
    if written:
        meta["written"] = written
    for name, values in (("scores", [row.score for row in both]), ("by", [row.meta.get("by") for row in both])):
        if None not in values:
            meta[name] = values
    return Example(
        prompt=chosen.prompt,
        chosen=chosen.response,
        rejected=rejected.response,
        teacher_prompt=chosen.teacher_prompt,
        domain=chosen.domain,
        weight=chosen.weight,
        meta=meta,
    )
