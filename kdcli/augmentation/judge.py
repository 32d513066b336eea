"""A judge scores what is there: direct feedback as in RLAIF (Lee et al. 2023), arXiv:2309.00267, §3.3."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, Unpack

from kdcli.api import Example
from kdcli.augmentation._asking import AskingSettings, Question, filled
from kdcli.augmentation._grouped import Grouped, Heard, noted, plain
from kdcli.augmentation._principles import drawn
from kdcli.store.examples import BadRow

POINTS = {"yes": 1.0, "no": 0.0}


class Judge(Grouped):
    """Each answer (`over=answers`), or each of its `meta.passages` (`over=passages`), asked about by itself.

    The score goes `into` the row's `score` or a name of `meta`; what else the judge says goes to `meta`. The score of a
    record is its `score`, or the mean of its `aspects` {name: rating}, or minus the sum of the `penalty` of its
    `errors`, or the `points` of its `verdict`. Judged passages keep what was said of each; the row's score is left.
    A score beyond the prompt's scale (its parser's bounds) makes no row, nor does a passage that nobody could judge.
    Templates may name `principle`, one of `principles` (empty: the packaged ones) drawn per row, and `passage`.
    """

    extra = ("principle", "passage")

    def __init__(
        self,
        *,
        prompt: str = "judge/score",
        over: Literal["answers", "passages"] = "answers",
        points: Mapping[str, float] = POINTS,
        principles: Sequence[str] = (),
        into: str = "score",
        **settings: Unpack[AskingSettings],
    ) -> None:
        super().__init__(prompt=prompt, **settings)
        self.over = over
        self.points = {str(name).casefold(): float(value) for name, value in points.items()}
        self.principles = list(principles)
        self.into = into

    def units(self, examples: Iterable[Example]) -> Iterator[list[Example]]:
        return ([example] for example in examples)

    def about(self, rows: Sequence[Example]) -> Iterable[Question]:
        extra = {"principle": drawn(self.desk, self.principles, rows[0])}
        if self.over == "answers":
            yield self.question(rows[0], extra=extra, only=False)
            return
        for i, passage in enumerate(rows[0].meta.get("passages") or ()):
            yield self.question(rows[0], extra={**extra, "passage": passage}, key=("passage", i), only=False, thing=i)

    def settled(self, rows: Sequence[Example], heard: Heard) -> Sequence[Iterable[Example]]:
        try:
            return [[self._judged(rows[0], heard) if self.over == "answers" else self._sifted(rows[0], heard)]]
        except BadRow as error:
            if error.reason:  # else it was set aside already, with what was answered
                self.desk.aside(rows[0], error.reason, str(error))
            return [[]]

    def _judged(self, row: Example, heard: Heard) -> Example:
        (_, replies) = heard[0]
        if not replies:
            raise BadRow("", "no answer")
        record = replies[0].records[0]
        made = filled(row, plain(record), replies[0].written)
        score = score_of(record, self.points)
        if score is None:
            return made
        if self.into == "score":
            return replace(made, score=score)
        return replace(made, meta={**made.meta, self.into: score})

    def _sifted(self, row: Example, heard: Heard) -> Example:
        passages = row.meta.get("passages")
        if not passages:
            raise BadRow("lacks a field", "the row has no meta.passages; put a step retrieve before this one")
        if not all(replies for _, replies in heard):
            raise BadRow("", "no answer")
        said = {i: replies[0].records[0] for i, replies in heard}
        judged = [{**passage, **self._with_score(said[i])} for i, passage in enumerate(passages)]
        made = noted(row, [reply for _, replies in heard for reply in replies])
        return replace(made, meta={**made.meta, "passages": judged})

    def _with_score(self, record: Mapping[str, Any]) -> dict[str, Any]:
        score = score_of(record, self.points)
        return dict(record) if score is None else {**record, "score": score}


def score_of(record: Mapping[str, Any], points: Mapping[str, float]) -> float | None:
    """The number that a judge's record comes to, or None where it names none. Raises BadRow where it is no number."""
    try:
        if "score" in record:
            value = float(record["score"])
        elif isinstance(aspects := record.get("aspects"), Mapping) and aspects:
            value = sum(map(float, aspects.values())) / len(aspects)
        elif isinstance(errors := record.get("errors"), Sequence) and not isinstance(errors, str):
            value = -sum(abs(float(error["penalty"])) for error in errors)
        else:
            return points.get(str(record.get("verdict", "")).casefold())
    except (TypeError, ValueError, KeyError):
        raise BadRow("no number", "what the judge wrote as a score is no number") from None
    if not math.isfinite(value):
        raise BadRow("no number", "what the judge wrote as a score is no finite number")
    return value
