"""New prompts in the manner of a pool of others, which grows: Wang et al. 2022 (Self-Instruct), arXiv:2212.10560."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Unpack

from kdcli.api import Example
from kdcli.augmentation._asking import Asking, AskingSettings, Question, Reply, child
from kdcli.augmentation._grouped import demand
from kdcli.augmentation._making import positive, records
from kdcli.augmentation._rouge import RougeL
from kdcli.errors import ConfigError
from kdcli.store.examples import BadRow

CALLS = 10  # per wanted row, at most, where max_calls is null
BARREN = 3  # waves in a row without a new prompt that end the step


class Expand(Asking):
    """`count` new prompts, each asked for with `demos` rows of the pool, `generated_demos` of them written before.

    Calls are made in waves of `wave`, and the pool grows between waves only, so that what is written does not depend
    on which answer came first. A prompt whose ROUGE-L with one of the pool reaches `max_similarity` is set aside.
    Templates may name `demos` (rows), `count` (how many a call asks for: `per_call`, or what is left) and `topic`,
    drawn per call from `topics`, or else from the demos' `meta.topic`. Ends at `count` rows, at `max_calls` (null: ten
    a row) or after three waves without a new prompt. Seeds must fit in memory; rows that `only` lets pass are no seeds.
    """

    extra = ("demos", "count", "topic")

    def __init__(
        self,
        *,
        prompt: str = "expand/self_instruct",
        count: int = 100,
        demos: int = 8,
        generated_demos: int = 2,
        per_call: int = 4,
        topics: Sequence[str] = (),
        wave: int = 32,
        max_similarity: float | None = 0.7,
        max_calls: int | None = None,
        keep_seeds: bool = False,
        **settings: Unpack[AskingSettings],
    ) -> None:
        super().__init__(prompt=prompt, **settings)
        demand(self.prompt, self.where, ("prompt",))
        positive(self.where, count=count, demos=demos, per_call=per_call, wave=wave, max_calls=max_calls)
        if not 0 <= generated_demos <= demos:
            raise ConfigError(f"{self.where}.generated_demos is {generated_demos}; give 0 to {demos}, of demos={demos}")
        if max_similarity is not None and not 0.0 < max_similarity <= 1.0:
            raise ConfigError(f"{self.where}.max_similarity is {max_similarity}; give 0 to 1, or null")
        self.count = count
        self.demos = demos
        self.generated_demos = generated_demos
        self.per_call = per_call
        self.topics = [str(topic) for topic in topics]
        self.wave = wave
        self.max_similarity = max_similarity
        self.max_calls = CALLS * count if max_calls is None else max_calls
        self.keep_seeds = keep_seeds

    def __call__(self, examples: Iterable[Example]) -> Iterator[Example]:
        seeds: list[Example] = []
        for example in examples:
            try:
                seed = self.applies(example)
                if seed and not (example.prompt or example.text):
                    raise BadRow("lacks a field", "a seed needs a prompt")
            except BadRow as error:
                self.desk.aside(example, error.reason, str(error))
                continue
            if seed:
                seeds.append(example)
            if not seed or self.keep_seeds:
                yield example
        if seeds:
            yield from self._written(seeds)

    def _written(self, seeds: Sequence[Example]) -> Iterator[Example]:
        pool = _Pool(seeds, None if self.desk.rehearsal else self.max_similarity)
        asked = barren = number = 0
        expected = self._per_answer()
        while len(pool.written) < self.count and asked < self.max_calls and barren < BARREN:
            left = self.count - len(pool.written)
            size = min(self.wave, self.max_calls - asked, -(-left // expected))
            before = len(pool.written)
            yield from self._wave(pool, number, size)
            asked, number = asked + size, number + 1
            barren = barren + 1 if len(pool.written) == before else 0

    def _per_answer(self) -> int:
        """How many prompts an answer is expected to hold: the parser's example says."""
        return min(self.per_call, len(self.prompt.parser(self.prompt.example)))

    def _wave(self, pool: _Pool, number: int, size: int) -> Iterator[Example]:
        questions = [self._draw(pool, number, call) for call in range(size)]
        found: list[Example] = []
        for question, replies in self.ask(questions):
            for reply, record in records(replies):
                if len(pool.written) + len(found) == self.count:
                    continue
                row = self._row(question, record, reply)
                if (near := pool.near(str(record["prompt"]))) is not None:
                    self.desk.aside(row, "too similar", f"its ROUGE-L with another prompt is {near:.2f}", reply.text)
                    continue
                pool.note(row)
                found.append(row)
        pool.grow(found)
        yield from found

    def _draw(self, pool: _Pool, number: int, call: int) -> Question:
        """A question with demos of its own, drawn from the pool as it stood before the wave."""
        draw = random.Random(self.desk.seed("demos", number, call))
        written = draw.sample(pool.written, min(self.generated_demos, len(pool.written)))
        demos = written + draw.sample(pool.seeds, min(self.demos - len(written), len(pool.seeds)))
        draw.shuffle(demos)
        extra: dict[str, Any] = {"demos": demos, "count": min(self.per_call, self.count - len(pool.written))}
        topics = self.topics or [one.meta["topic"] for one in demos if "topic" in one.meta]
        if topics:
            extra["topic"] = draw.choice(topics)
        thing = (demos, {"topic": extra["topic"]} if self.topics else {})
        return self.question(demos[0], extra=extra, key=(number, call), only=False, thing=thing)

    def _row(self, question: Question, record: Mapping[str, Any], reply: Reply) -> Example:
        demos, meta = question.thing
        return child(demos, record, reply.written, meta=meta)


class _Pool:
    """Seeds, rows written so far, and which prompts are near another."""

    def __init__(self, seeds: Sequence[Example], max_similarity: float | None) -> None:
        self.seeds = list(seeds)
        self.written: list[Example] = []
        self._texts = None if max_similarity is None else RougeL(max_similarity)
        for seed in seeds:
            self.note(seed)

    def near(self, text: str) -> float | None:
        """ROUGE-L with the nearest known prompt, if that is too near."""
        found = self._texts.find(text) if self._texts is not None else None
        return None if found is None else found[1]

    def note(self, row: Example) -> None:
        if self._texts is not None:
            self._texts.add(row.prompt or row.text or "")

    def grow(self, rows: Sequence[Example]) -> None:
        self.written += rows
