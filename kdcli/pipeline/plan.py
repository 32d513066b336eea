"""What a run will ask and spend, before anything is asked: the steps run over some seeds, each question answered by
what the store has, or by the example of its prompt file."""

from __future__ import annotations

import copy
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from kdcli.api import Answer, Example, Request, Writer
from kdcli.errors import ConfigError
from kdcli.pipeline.commits import ROWS, Commit, hashed, read_rows, run_id
from kdcli.pipeline.desk import seed_of
from kdcli.pipeline.office import Asked
from kdcli.store.responses import Responses, Spent, request_key

if TYPE_CHECKING:
    from kdcli.pipeline.pipeline import Pipeline

T = TypeVar("T")
DAY = "0000-00-00"  # of answers that nobody wrote


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What one step asks one writer. `most`: if every answer were as long as max_tokens lets it be; None: no limit."""

    calls: int = 0  # that will be made and paid for
    stored: int = 0  # questions that the store answers
    prompt_tokens: int = 0  # of the calls
    completion_tokens: int = 0  # expected: answers as long as the prompt file's example
    completion_tokens_most: int | None = 0
    cost: float = 0.0
    cost_most: float | None = 0.0


@dataclass(frozen=True, kw_only=True)
class PlannedStep:
    """One step of a plan. `aside`: reasons for which it sets rows aside already in rehearsal, such as a field that a
    template needs and a row lacks; of the rows that were tried, not scaled."""

    name: str
    done: bool  # committed in this run folder: costs nothing
    rows_in: int
    rows_out: int  # at most: filters keep all in rehearsal
    aside: dict[str, int] = field(default_factory=dict)
    writers: dict[str, Estimate] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All steps. `exact`: all seeds were tried, so that calls are exact but for what filters will drop."""

    seeds: int
    tried: int
    exact: bool
    steps: Sequence[PlannedStep]
    spent: Spent  # by this run folder so far

    @property
    def total(self) -> Estimate:
        found = Estimate()
        for step in self.steps:
            for one in step.writers.values():
                found = _sum(found, one)
        return found


class Rehearsal:
    """Makes plans. Seeds are tried in two rounds, of all and of half of the sample: what grows with them is scaled to
    all seeds, what does not (so many prompts, however many seeds) stays."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline

    def plan(self, rows: int) -> Plan:
        """Raises ConfigError for fewer than 2 rows."""
        if rows < 2:
            raise ConfigError(f"a plan needs at least 2 rows to try, not {rows}")
        store = Responses(self.pipeline.answers) if self.pipeline.answers.is_file() else None
        try:
            done, read, total = self._start()
            sample = _sampled(read(), total, rows)
            spent = self._spent(store)
            whole = self._tried(sample, done, store)
            if len(sample) < total:
                half = self._tried(sample[: ceil(len(sample) / 2)], done, store)
                part = ceil(len(sample) / 2), len(sample), total
                whole = [_scaled(few, many, part) for few, many in zip(half, whole, strict=True)]
        finally:
            if store is not None:
                store.close()
        return Plan(seeds=total, tried=len(sample), exact=len(sample) == total, steps=[*done, *whole], spent=spent)

    def _start(self) -> tuple[list[PlannedStep], Callable[[], Iterable[Example]], int]:
        """Steps that this run folder has done, what to read after them, and how many rows that is."""
        pipeline, done = self.pipeline, []
        content, place, last = pipeline.content, None, None
        for name in pipeline.steps:
            commit = Commit.read(pipeline.place(name), hashed([content, pipeline.step_facts(name)]))
            if commit is None:
                break
            done.append(
                PlannedStep(
                    name=name, done=True, rows_in=commit.rows_in, rows_out=commit.rows, aside=dict(commit.aside)
                )
            )
            content, place, last = commit.rows_hash, pipeline.place(name) / ROWS, commit
        if place is not None and last is not None:
            return done, lambda: read_rows(place), last.rows
        known = pipeline.seeds()[1]
        total = known if known is not None else sum(1 for _ in pipeline.seeds()[0])
        return done, lambda: pipeline.seeds()[0], total

    def _spent(self, store: Responses | None) -> Spent:
        run = run_id(self.pipeline.folder, make=False)
        return sum(store.spent(run).values(), Spent()) if store is not None and run else Spent()

    def _tried(
        self, sample: Sequence[Example], done: Sequence[PlannedStep], store: Responses | None
    ) -> list[PlannedStep]:
        """The steps that are left over these rows."""
        pipeline, found = self.pipeline, []
        rows = list(sample)
        made_up = False
        with tempfile.TemporaryDirectory(prefix="kdcli-plan-") as folder:
            for name in list(pipeline.steps)[len(done) :]:
                scratch = Path(folder) / name
                scratch.mkdir()
                desk = RehearsalDesk(name, pipeline, scratch, store, unique=not made_up)
                step = copy.copy(pipeline.steps[name])
                step.open(desk)
                count = len(rows)
                rows = list(step(iter(rows)))
                made_up = made_up or desk.made_up
                found.append(
                    PlannedStep(
                        name=name,
                        done=False,
                        rows_in=count,
                        rows_out=len(rows),
                        aside=dict(sorted(desk.reasons.items())),
                        writers=desk.estimates,
                    )
                )
        return found


class RehearsalDesk:
    """A `kdcli.api.Desk` that asks nobody and counts. `unique`: equal questions are one call; not so where rows are
    made up already, and only look equal."""

    rehearsal = True

    def __init__(self, step: str, pipeline: Pipeline, folder: Path, store: Responses | None, *, unique: bool) -> None:
        self.step = step
        self.folder = folder
        self.estimates: dict[str, Estimate] = {}
        self.reasons: Counter[str] = Counter()
        self.made_up = False
        self._pipeline = pipeline
        self._store = store
        self._unique = unique
        self._seen: set[bytes] = set()
        self._writers: dict[str, Asked] = {}

    def ask(self, writer: str, questions: Iterable[tuple[T, Request]]) -> Iterator[tuple[T, Answer]]:
        for thing, request in questions:
            yield thing, self._answer(writer, request)

    def aside(self, example: Example, reason: str, detail: str = "", text: str = "") -> None:
        del example, detail, text
        self.reasons[reason] += 1

    def seed(self, *parts: str | int) -> int:
        return seed_of(self._pipeline.seed, self.step, *parts)

    def remember(self, kind: str, keys: Sequence[str], compute: Callable[[Sequence[int]], Sequence[Any]]) -> list[Any]:
        found = self._store.recall(kind, keys) if self._store else {}
        missing = [index for index, key in enumerate(keys) if key not in found]
        values = dict(zip(missing, compute(missing) if missing else (), strict=True))
        return [values[index] if index in values else found[key] for index, key in enumerate(keys)]

    def provenance(self, writer: str, answer: Answer, template: str) -> dict[str, Any]:
        return self._of(writer).provenance(self.step, answer, template)

    def _of(self, writer: str) -> Asked:
        if writer not in self._writers:
            if writer not in self._pipeline.writers:
                raise ConfigError(f"augmentation.{self.step}: asks the writer {writer}, and there is none of that name")
            self._writers[writer] = Asked(writer, self._pipeline.writers[writer])
        return self._writers[writer]

    def _answer(self, name: str, request: Request) -> Answer:
        asked = self._of(name)
        key = request_key(asked.identity, request)
        known = self.estimates.get(name, Estimate())
        stored = self._store.find(key) if self._store else None
        if stored is not None or (self._unique and key in self._seen):
            self.estimates[name] = replace(known, stored=known.stored + 1)
        else:
            self.estimates[name] = _sum(known, _call(asked.writer, request))
        self._seen.add(key)
        if stored is not None:
            return stored
        self.made_up = True
        texts = [request.rehearsal] * request.n
        return Answer(texts=texts, finished=["stop"] * request.n, model=asked.writer.model, date=DAY)


def _call(writer: Writer, request: Request) -> Estimate:
    """One call."""
    prompt = writer.count_tokens(request.messages)
    one = max(1, writer.count_tokens([{"role": "assistant", "content": request.rehearsal}]) - 4)
    limit = request.max_tokens or getattr(writer, "max_tokens", None)
    expected = request.n * (min(one, limit) if limit else one)
    most = request.n * limit if limit else None

    def cost(completion: int) -> float:
        return (prompt * writer.price_prompt + completion * writer.price_completion) / 1e6

    return Estimate(
        calls=1,
        prompt_tokens=prompt,
        completion_tokens=expected,
        completion_tokens_most=most,
        cost=cost(expected),
        cost_most=None if most is None and writer.price_completion else cost(most or 0),
    )


def _sampled(rows: Iterable[Example], total: int, wanted: int) -> list[Example]:
    """About `wanted` of `total` rows, evenly spread; rows of one group come together."""
    found: list[Example] = []
    bucket, group, taken = -1, None, False
    for number, example in enumerate(rows):
        if group is None or example.group != group:
            here = number * wanted // max(total, wanted) if total > wanted else number
            taken, bucket, group = here > bucket, max(here, bucket), example.group
        if taken:
            found.append(example)
    return found


def _sum(one: Estimate, other: Estimate) -> Estimate:
    return _each(lambda a, b: None if a is None or b is None else a + b, one, other)


def _scaled(few: PlannedStep, many: PlannedStep, part: tuple[int, int, int]) -> PlannedStep:
    """From what `part[0]` and `part[1]` seeds made to what `part[2]` will make: along the line through both."""
    half, whole, total = part
    slope = (total - whole) / max(1, whole - half)

    def along(a: Any, b: Any) -> Any:
        if a is None or b is None:
            return None
        value = b + max(0.0, (b - a) * slope)
        return round(value) if isinstance(b, int) else value

    none = Estimate()
    return replace(
        many,
        rows_in=along(few.rows_in, many.rows_in),
        rows_out=along(few.rows_out, many.rows_out),
        writers={name: _each(along, few.writers.get(name, none), one) for name, one in many.writers.items()},
    )


def _each(function: Callable[[Any, Any], Any], one: Estimate, other: Estimate) -> Estimate:
    return Estimate(**{name: function(value, getattr(other, name)) for name, value in vars(one).items()})
