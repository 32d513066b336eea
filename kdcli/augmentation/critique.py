"""Critique and revision, in rounds: Self-Refine (Madaan et al. 2023), arXiv:2303.17651."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Unpack

from kdcli.api import Example
from kdcli.augmentation._asking import Asking, AskingSettings, Question, Reply, blocks
from kdcli.augmentation._grouped import demand, group_key, noted
from kdcli.augmentation._principles import drawn
from kdcli.errors import ConfigError
from kdcli.store.examples import BadRow
from kdcli.text.prompt import ROW, Expression


@dataclass(kw_only=True)
class _Work:
    """A row under revision."""

    place: int
    row: Example  # as it stands: the answer of the last revision
    principle: str
    made: list[Example] | None = None  # what came of it; empty: it was set aside


class Critique(Asking):
    """`rounds` times: `prompt` criticises the response, `revise` writes it anew by the critique.

    A critique's record has `critique` (and perhaps a score and other fields, which `stop` may name: where that
    expression holds, the answer stays as it is); a record with `response` is a revision already, and `revise` is not
    asked. `revise: null` without such a field leaves the answer, and only adds `meta.critique`. The first answer is
    kept in `meta.draft`, everything in `meta.chain`: [{kind: draft | critique | revision, text, and a critique's other
    fields}]. `n` revisions in the last round make rows of one group (ILF, arXiv:2303.16755). The templates of both
    prompts see the row with its present response and `meta.critique`, and may name `round` (from 1) and `principle`,
    one of `principles` (empty: the packaged ones) drawn per row and round (arXiv:2212.08073).
    """

    extra = ("principle", "round")

    def __init__(
        self,
        *,
        prompt: str = "critique/plain",
        revise: str | None = "critique/revise",
        rounds: int = 1,
        stop: str | None = None,
        n: int = 1,
        principles: Sequence[str] = (),
        **settings: Unpack[AskingSettings],
    ) -> None:
        super().__init__(prompt=prompt, **settings)
        demand(self.prompt, self.where, ("critique",), ("response",))
        self.revise = None if revise is None else self.load(revise, "revise")
        if self.revise is not None:
            demand(self.revise, self.where, ("response",))
        if rounds < 1 or n < 1:
            raise ConfigError(f"{self.where}: rounds is {rounds} and n {n}; give 1 or more")
        self.rounds = rounds
        self.n = n
        names = ROW | set(self.prompt.parser.fields) | set(self.extra)
        self.stop = None if stop is None else Expression(stop, where=f"{self.where}.stop", names=names)
        self.principles = list(principles)

    def __call__(self, examples: Iterable[Example]) -> Iterator[Example]:
        for block in blocks(examples):
            results: list[list[Example]] = [[] for _ in block]
            works = list(self._begun(block, results))
            for number in range(1, self.rounds + 1):
                self._round([work for work in works if work.made is None], number)
            for work in works:
                results[work.place] = [work.row] if work.made is None else work.made
            for rows in results:
                yield from rows

    def _begun(self, block: Sequence[Example], results: list[list[Example]]) -> Iterator[_Work]:
        for place, row in enumerate(block):
            try:
                if not self.applies(row):
                    results[place] = [row]
                    continue
                if not row.response:
                    raise BadRow("no response", "the row has no response to criticise; put label or rollout before")
            except BadRow as error:
                self.desk.aside(row, error.reason, str(error))
                continue
            meta = {**row.meta, "draft": row.response, "chain": [{"kind": "draft", "text": row.response}]}
            yield _Work(place=place, row=replace(row, meta=meta), principle="")

    def _round(self, works: Sequence[_Work], number: int) -> None:
        """One wave of critiques, then one of revisions."""
        n = self.n if number == self.rounds else 1
        for work in works:
            work.principle = drawn(self.desk, self.principles, work.row, number)
        direct = n if "response" in self.prompt.parser.fields else 1
        wanted = []
        for question, replies in self.ask([self._question(work, number, n=direct) for work in works]):
            work: _Work = question.thing
            if not replies:
                work.made = []
            elif self._heard(work, replies, number) and self.revise is not None:
                wanted.append(work)
        revise = self.revise
        for question, replies in self.ask([self._question(work, number, n=n, prompt=revise) for work in wanted]):
            self._take(question.thing, replies, n)

    def _question(self, work: _Work, number: int, **settings: Any) -> Question:
        extra = {"principle": work.principle, "round": number}
        key = (number, "revise" if settings.get("prompt") else "critique")
        return self.question(work.row, extra=extra, key=key, only=False, thing=work, **settings)

    def _heard(self, work: _Work, replies: Sequence[Reply], number: int) -> bool:
        """Take a critique in; whether a revision is to be asked for."""
        record = replies[0].records[0]
        if "response" in record:
            self._take(work, replies, len(replies))
            return False
        said = {name: value for name, value in record.items() if name not in ("critique", "score")}
        row = noted(work.row, replies[:1])
        score = {"score": record["score"]} if "score" in record else {}
        entry = {"kind": "critique", "text": record.get("critique", ""), **said, **score}
        meta = {**row.meta, **said, "critique": record.get("critique", ""), "chain": [*row.meta["chain"], entry]}
        work.row = replace(row, meta=meta)
        try:
            done = self._stops(work.row, record, number) if not self.desk.rehearsal else False
        except BadRow as error:
            self.desk.aside(work.row, error.reason, str(error))
            work.made = []
            return False
        if (done or self.revise is None) and isinstance(record.get("score"), int | float):
            work.row = replace(work.row, score=float(record["score"]))
        if done:
            work.made = [work.row]
        return not done

    def _stops(self, row: Example, record: Mapping[str, Any], number: int) -> bool:
        return self.stop is not None and self.stop.holds(
            {"response": row.response, "meta": row.meta, **record, "round": number}
        )

    def _take(self, work: _Work, replies: Sequence[Reply], n: int) -> None:
        """The revisions in place of the answer; several are rows of a group."""
        rows = [self._revised(work.row, reply) for reply in replies]
        if n > 1:
            group = group_key(replace(work.row, response=work.row.meta["draft"]))
            work.made = [replace(row, group=group) for row in rows]
        elif rows:
            work.row = rows[0]
        else:
            work.made = []

    @staticmethod
    def _revised(row: Example, reply: Reply) -> Example:
        record = reply.records[0]
        text = str(record["response"])
        said = {name: value for name, value in record.items() if name not in ("response", "score")}
        chain = [*row.meta["chain"], *([{"kind": "critique", "text": said["critique"]}] if "critique" in said else ())]
        row = noted(row, [reply])
        meta = {**row.meta, **said, "chain": [*chain, {"kind": "revision", "text": text}]}
        return replace(row, response=text, score=None, meta=meta)
