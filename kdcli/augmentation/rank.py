"""Listwise ranking of a group's answers or a row's passages: RankGPT, Sun et al. 2023, arXiv:2304.09542."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from copy import copy, deepcopy
from dataclasses import dataclass, field, replace
from itertools import permutations
from typing import Any, Literal, Unpack

from kdcli.api import Example
from kdcli.augmentation._asking import Asking, AskingSettings, Question, Reply, groups
from kdcli.augmentation._grouped import answer_of, demand, noted
from kdcli.errors import ConfigError
from kdcli.store.examples import BadRow
from kdcli.text.parse import Parser
from kdcli.text.prompt import Prompt

SPELLED = 5  # items of which all permutations are written into the pattern that a writer is held to


@dataclass(kw_only=True)
class _List:
    """What is ranked together: answers of rows, or passages of one row."""

    rows: list[Example]
    items: list[Any]
    order: list[int]  # the best first; an index into items
    end: int  # of the window that is asked about next; 0: done
    scores: dict[int, float] = field(default_factory=dict)
    replies: list[Reply] = field(default_factory=list)
    problem: tuple[str, str] | None = None  # why it was given up; an empty reason: it was set aside already


class Rank(Asking):
    """One ranking per list; the answer at position p (1..k) of k gets

        score = (k - p) / (k - 1)       1 for the best, 0 for the last

    `over=answers`: the answers of a group, in the row's score; `over=passages`: each row's `meta.passages`, which are
    sorted, each with its `rank` (from 1) and `score`. Lists longer than `window` are ranked by windows that slide
    from the end to the start by `stride`, one call after the other (RankGPT, §3.2). Records have `ranking`, numbers
    from 1, the best first, as a list or as text such as `[2] > [1]`; or `scores`, one per item, which are used as they
    are. What is no permutation sets the list aside. Templates get `answers`: the texts, or the passages.
    """

    extra = ("answers",)

    def __init__(
        self,
        *,
        prompt: str = "rank/list",
        over: Literal["answers", "passages"] = "answers",
        window: int = 20,
        stride: int = 10,
        into: str = "score",
        **settings: Unpack[AskingSettings],
    ) -> None:
        super().__init__(prompt=prompt, **settings)
        demand(self.prompt, self.where, ("ranking",), ("scores",))
        if not 1 <= stride < window:
            raise ConfigError(f"{self.where}: stride is {stride} and window {window}; give 1 <= stride < window")
        self.over = over
        self.window = window
        self.stride = stride
        self.into = into
        self._prompts: dict[int, Prompt] = {}

    def __call__(self, examples: Iterable[Example]) -> Iterator[Example]:
        units = groups(examples) if self.over == "answers" else ([example] for example in examples)
        for block in _blocks(units):
            plans = [self._plan(rows) for rows in block]
            waiting = [one for _, one in plans if one is not None and one.end]
            while waiting:
                self._wave(waiting)
                waiting = [one for one in waiting if one.end]
            for rows, one in plans:
                yield from rows if one is None else self._placed(rows, one)

    def _plan(self, unit: Sequence[Example]) -> tuple[list[Example], _List | None]:
        """The rows that go on, in order, and what of them is ranked."""
        kept, ranked = [], []
        for row in unit:
            try:
                applies = self.applies(row)
                if applies and self.over == "passages" and not row.meta.get("passages"):
                    raise BadRow("lacks a field", "the row has no meta.passages; put a step retrieve before this one")
                if applies:
                    answer_of(row)
            except BadRow as error:
                self.desk.aside(row, error.reason, str(error))
                continue
            kept.append(row)
            ranked += [row] if applies else []
        if not ranked:
            return kept, None
        items = [answer_of(row) for row in ranked] if self.over == "answers" else list(ranked[0].meta["passages"])
        one = _List(rows=ranked, items=items, order=list(range(len(items))), end=len(items))
        if len(items) == 1:
            one.end = 0
            if self.over == "answers":
                one.problem = ("alone in its group", "there is no other answer to rank it with; ask for more with n")
        return kept, one

    def _wave(self, waiting: Sequence[_List]) -> None:
        for question, replies in self.ask(self._questions(waiting)):
            one: _List = question.thing
            if not replies:
                one.problem, one.end = ("", ""), 0
                continue
            self._apply(one, replies[0])

    def _questions(self, waiting: Sequence[_List]) -> Iterator[Question]:
        for one in waiting:
            start = max(0, one.end - self.window)
            shown = [one.items[i] for i in one.order[start : one.end]]
            prompt = (
                self.prompt if self.desk.rehearsal else self._held(len(shown))
            )  # its example has a length of its own
            key = ("window", start, one.end)
            yield self.question(one.rows[0], prompt=prompt, extra={"answers": shown}, key=key, only=False, thing=one)

    def _held(self, k: int) -> Prompt:
        """The prompt with a parser that reads lists of k alone, so that other answers are asked for again."""
        if k not in self._prompts:
            self._prompts[k] = copy(self.prompt)
            self._prompts[k].parser = _ListParser(self.prompt.parser, k)  # type: ignore[assignment]
        return self._prompts[k]

    def _apply(self, one: _List, reply: Reply) -> None:
        start = max(0, one.end - self.window)
        shown = one.order[start : one.end]
        record = reply.records[0]
        if self.desk.rehearsal:
            pass
        elif "ranking" in record:
            one.order[start : one.end] = [shown[i - 1] for i in record["ranking"]]
        else:
            one.scores |= dict(zip(shown, record["scores"], strict=True))
        one.replies.append(reply)
        one.end = 0 if start == 0 else one.end - self.stride

    def _placed(self, rows: Sequence[Example], one: _List) -> Iterator[Example]:
        """The rows with their scores, in place; those of a list that was given up are set aside."""
        if one.problem is not None:
            for row in rows:
                if not any(row is ranked for ranked in one.rows):
                    yield row
                elif one.problem[0] or row is not one.rows[0]:  # the first was set aside with what was answered
                    self.desk.aside(row, one.problem[0] or "no ranking of its group", one.problem[1])
            return
        k = len(one.items)
        scores = [one.scores.get(i, (k - 1 - one.order.index(i)) / max(1, k - 1)) for i in range(k)]
        if self.over == "passages":
            yield self._sorted(one, scores)
            return
        found = {id(row): score for row, score in zip(one.rows, scores, strict=True)}
        for row in rows:
            yield noted(row, one.replies, self.into, found[id(row)]) if id(row) in found else row

    def _sorted(self, one: _List, scores: Sequence[float]) -> Example:
        order = sorted(one.order, key=lambda i: -scores[i]) if one.scores else one.order
        passages = [{**one.items[i], "rank": p, "score": scores[i]} for p, i in enumerate(order, start=1)]
        row = noted(one.rows[0], one.replies)
        return replace(row, meta={**row.meta, "passages": passages})


class _ListParser:
    """A parser of rankings, or scores, of exactly k items."""

    def __init__(self, parser: Parser, k: int) -> None:
        self.parser, self.k = parser, k

    def __call__(self, text: str) -> list[dict[str, Any]]:
        record = dict(self.parser(text)[0])
        if "ranking" in record:
            record["ranking"] = permutation(record["ranking"], self.k)
        else:
            record["scores"] = numbers(record.get("scores"), self.k)
        return [record]

    def form(self) -> dict[str, Any] | None:
        """The parser's form. A short ranking as text is held to the permutations themselves."""
        if self.parser.kind == "regex" and "ranking" in self.parser.fields:
            if self.k > SPELLED:
                return {"regex": rf"\[[0-9]+\]( > \[[0-9]+\]){{{self.k - 1}}}"}
            orders = permutations(range(1, self.k + 1))
            return {"regex": "(" + "|".join(r" > ".join(rf"\[{i}\]" for i in order) for order in orders) + ")"}
        found = self.parser.form()
        if found is None or "json" not in found:
            return found
        schema = deepcopy(dict(found["json"]))
        for name in ("ranking", "scores"):
            if name in (properties := schema.get("properties", {})):
                properties[name] |= {"minItems": self.k, "maxItems": self.k}
        if "ranking" in schema.get("properties", {}):
            schema["properties"]["ranking"]["items"] = {"type": "integer", "minimum": 1, "maximum": self.k}
        return {**found, "json": schema}


def permutation(said: Any, k: int) -> list[int]:
    """1..k in the order that was said. Raises BadRow where it is no permutation."""
    parts = re.findall(r"\d+", said) if isinstance(said, str) else said
    try:
        order = [int(part) for part in parts]
    except (TypeError, ValueError):
        raise BadRow("invalid permutation", "the ranking is no list of numbers") from None
    if sorted(order) != list(range(1, k + 1)):
        raise BadRow("invalid permutation", f"the ranking of {k} names {len(order)} numbers, not each of 1 to {k} once")
    return order


def numbers(said: Any, k: int) -> list[float]:
    """One number per item. Raises BadRow."""
    try:
        found = [float(part) for part in (re.findall(r"-?\d+(?:\.\d+)?", said) if isinstance(said, str) else said)]
    except (TypeError, ValueError):
        raise BadRow("no number", "the scores are no list of numbers") from None
    if len(found) != k or not all(map(math.isfinite, found)):
        raise BadRow("wrong number of scores", f"there are {len(found)} scores for {k} items")
    return found


def _blocks(units: Iterable[list[Example]], size: int = 256) -> Iterator[list[list[Example]]]:
    """Some hundred rows at a time, by whole groups."""
    held: list[list[Example]] = []
    for rows in units:
        held.append(rows)
        if sum(map(len, held)) >= size:
            yield held
            held = []
    if held:
        yield held
