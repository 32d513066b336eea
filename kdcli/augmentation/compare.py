"""Pairwise verdicts in both orders, so that a taste for one place cancels: Zheng et al. 2023, arXiv:2306.05685."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any, Literal, NamedTuple, Unpack

from kdcli.api import Example
from kdcli.augmentation._asking import AskingSettings, Question, Reply
from kdcli.augmentation._grouped import Grouped, Heard, answer_of, demand, noted
from kdcli.augmentation._principles import drawn
from kdcli.store.examples import BadRow, content_key

FIRST, SECOND = {"first", "1", "a"}, {"second", "2", "b"}
TIE = {"tie", "equal", "both", "neither", "c"}
RESULTS = {0.0: "lost", 0.5: "tie", 1.0: "won"}


class Compare(Grouped):
    """Every two answers of a group, compared by `writer`; a verdict that depends on the order is a tie.

        score = (wins + ties / 2) / comparisons       in [0, 1], the share of comparisons won

    `score=rating`: the mean of the ratings that the judge gave an answer (records with `first_score`, `second_score`).
    Records have `winner` (first, second or tie), or the two scores. Each row's `meta.comparisons` lists
    {other, result, reason}. A comparison without a usable answer does not count; a row without any is set aside.
    Templates get `first` and `second`, and `principle`.
    """

    extra = ("first", "second", "principle")

    def __init__(
        self,
        *,
        prompt: str = "compare/pair",
        both_orders: bool = True,
        score: Literal["wins", "rating"] = "wins",
        principles: Sequence[str] = (),
        into: str = "score",
        **settings: Unpack[AskingSettings],
    ) -> None:
        super().__init__(prompt=prompt, **settings)
        demand(self.prompt, self.where, ("winner",), ("first_score", "second_score"))
        self.both_orders = both_orders
        self.score = score
        self.principles = list(principles)
        self.into = into

    def about(self, rows: Sequence[Example]) -> Iterable[Question]:
        for i, j in combinations(range(len(rows)), 2):
            try:
                texts = answer_of(rows[i]), answer_of(rows[j])
            except BadRow:
                continue  # `settled` sets the row aside, once
            principle = drawn(self.desk, self.principles, rows[0], content_key(rows[i]), content_key(rows[j]))
            for order in ((i, j), (j, i)) if self.both_orders else ((i, j),):
                first, second = texts if order == (i, j) else texts[::-1]
                meta = {**rows[i].meta, "first": first, "second": second}
                pair = Example(prompt=rows[i].prompt or "", domain=rows[i].domain, meta=meta)
                extra = {"first": first, "second": second, "principle": principle}
                key = (content_key(rows[order[0]]), content_key(rows[order[1]]))
                yield self.question(pair, extra=extra, key=key, only=False, thing=(order, pair))

    def settled(self, rows: Sequence[Example], heard: Heard) -> Sequence[Iterable[Example]]:
        told = {order: one for (order, pair), replies in heard if replies and (one := self._verdict(pair, replies[0]))}
        results: list[list[Example]] = []
        for i, row in enumerate(rows):
            duels = {j: duel for j in range(len(rows)) if j != i and (duel := self._duel(told, i, j))}
            if duels:
                replies = [verdict.reply for order, verdict in told.items() if i in order]
                results.append([self._scored(row, rows, duels, replies)])
            else:
                self.desk.aside(row, *self._why(rows))
                results.append([])
        return results

    def _verdict(self, pair: Example, reply: Reply) -> _Verdict | None:
        try:
            return _Verdict(reply, *verdict(reply.records[0]))
        except BadRow as error:
            self.desk.aside(pair, error.reason, str(error), reply.text)
            return None

    def _duel(self, told: Mapping[tuple[int, int], _Verdict], i: int, j: int) -> _Duel | None:
        """i against j; None where an order lacks its answer."""
        orders = [(i, j), (j, i)] if self.both_orders else [(min(i, j), max(i, j))]
        if any(order not in told for order in orders):
            return None
        points = {told[o].points if o[0] == i else 1.0 - told[o].points for o in orders}
        ratings = [scores[o.index(i)] for o in orders if (scores := told[o].scores)]
        reasons = [str(told[o].reply.records[0].get("reason", "")) for o in orders]
        return _Duel(points.pop() if len(points) == 1 else 0.5, ratings, next(filter(None, reasons), ""))

    def _scored(
        self, row: Example, rows: Sequence[Example], duels: Mapping[int, _Duel], replies: Sequence[Reply]
    ) -> Example:
        told = [
            {"other": answer_of(rows[j]), "result": RESULTS[duel.points], "reason": duel.reason}
            for j, duel in duels.items()
        ]
        ratings = [rating for duel in duels.values() for rating in duel.ratings]
        if self.score == "rating" and ratings:
            value = sum(ratings) / len(ratings)
        else:
            value = sum(duel.points for duel in duels.values()) / len(duels)
        made = noted(row, replies, self.into, value)
        return noted(made, (), "comparisons", [*row.meta.get("comparisons", ()), *told])

    @staticmethod
    def _why(rows: Sequence[Example]) -> tuple[str, str]:
        if len(rows) == 1:
            return "alone in its group", "there is no other answer to compare with; ask for more with n, or keep=true"
        return "no comparison", "none of its comparisons got an answer of use in each order"


class _Verdict(NamedTuple):
    reply: Reply
    points: float  # of the first: 1, 1/2 or 0
    scores: tuple[float, float] | None  # of the first and of the second


class _Duel(NamedTuple):
    points: float
    ratings: list[float]
    reason: str


def verdict(record: Mapping[str, Any]) -> tuple[float, tuple[float, float] | None]:
    """Points of the first of two (1, 1/2 or 0), and both ratings if any. Raises BadRow where it is unclear."""
    try:
        scores = float(record["first_score"]), float(record["second_score"])
    except KeyError:
        scores = None
    except (TypeError, ValueError):
        raise BadRow("no number", "a rating of the judge is no number") from None
    said = str(record.get("winner", "")).strip().casefold()
    if said in FIRST | SECOND | TIE:
        return (1.0 if said in FIRST else 0.0 if said in SECOND else 0.5), scores
    if scores is None:
        raise BadRow("no verdict", "the judge names neither first nor second nor a tie")
    return 0.5 + 0.5 * ((scores[0] > scores[1]) - (scores[0] < scores[1])), scores
