"""Preference pairs without a judge, from a good and a bad way to ask: Yang et al. 2023 (RLCD), arXiv:2307.12950; from a
strong and a weak writer: Kim et al. 2023 (ALMoST), arXiv:2305.13735."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Unpack

from kdcli.api import Example
from kdcli.augmentation._asking import Asking, AskingSettings, Question, Reply, filled
from kdcli.augmentation._grouped import demand
from kdcli.store.examples import BadRow


class Contrast(Asking):
    """`chosen` by the prompt `good`, `rejected` by the prompt `bad`, which `writer_bad` answers (null: `writer`).

    Equal answers are no pair, and set aside. A row's older answer moves to `meta.reference`. The student's prompt is
    that of `good`, or else the row's own.
    """

    main = "good"

    def __init__(
        self,
        *,
        good: str = "contrast/helpful",
        bad: str = "contrast/unhelpful",
        writer_bad: str | None = None,
        **settings: Unpack[AskingSettings],
    ) -> None:
        super().__init__(prompt=good, **settings)
        self.bad = self.load(bad, "bad")
        self.writer_bad = writer_bad or self.writer
        for prompt in self.prompts:
            demand(prompt, self.where, ("response",))

    def writers(self) -> Sequence[str]:
        return (self.writer, self.writer_bad)

    def __call__(self, examples: Iterable[Example]) -> Iterator[Example]:
        for second, bad in self.ask(self._second(examples), self.writer_bad):
            first, good = second.thing
            if first.request is None and first.problem is None:
                yield first.example
            elif good and bad:
                yield from self._pair(first.example, good[0], bad[0])

    def _second(self, examples: Iterable[Example]) -> Iterator[Question]:
        """The bad question about each row whose good one was answered; others pass, as there is nothing to ask."""
        for first, good in self.ask(self.question(example, key=("good",)) for example in examples):
            if good:
                yield self.question(first.example, prompt=self.bad, key=("bad",), only=False, thing=(first, good))
            else:
                yield Question(example=first.example, prompt=self.bad, thing=(first, good))

    def _pair(self, example: Example, good: Reply, bad: Reply) -> Iterator[Example]:
        chosen, rejected = good.records[0], bad.records[0]
        try:
            prompt = self.prompt.for_student(example) or example.prompt
            if prompt is None:
                raise BadRow("lacks a field", f"the row has no prompt, and {self.prompt.name} gives the student none")
            if chosen["response"] == rejected["response"] and not self.desk.rehearsal:
                raise BadRow("no contrast", "both answers are the same")
        except BadRow as error:
            self.desk.aside(example, error.reason, str(error), good.text)
            return
        meta = dict(example.meta) if example.response is None else {**example.meta, "reference": example.response}
        fields = dict.fromkeys(("text", "messages", "response", "score"))
        pair = {"prompt": prompt, "chosen": chosen["response"], "rejected": rejected["response"]}
        more = {name: value for name, value in chosen.items() if name != "response"}
        row = filled(replace(example, **fields, meta=meta), more | pair, good.written)
        yield filled(row, {}, bad.written)
