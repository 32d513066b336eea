"""A teacher answers prompts: Kim and Rush 2016, arXiv:1606.07947; with prompts that the student does not see, Mukherjee
et al. 2023 (Orca), arXiv:2306.02707."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Unpack

from kdcli.api import Example
from kdcli.augmentation._asking import Asking, AskingSettings, Question, Reply, filled
from kdcli.augmentation._grouped import demand
from kdcli.augmentation._making import positive, records, together
from kdcli.store.examples import BadRow


class Label(Asking):
    """`n` answers to each row's prompt, as rows of one group.

    A row's older answer moves to `meta.reference`; with `keep` the row stays before them, in the same group. The
    prompt that stays in the row is the prompt file's `student`, or else the row's own; with `keep_teacher_prompt` what
    the teacher saw stands in `teacher_prompt`. A row's `text` becomes `meta.document`.
    """

    def __init__(
        self,
        *,
        prompt: str = "label/answer",
        n: int = 1,
        keep: bool = False,
        keep_teacher_prompt: bool = False,
        **settings: Unpack[AskingSettings],
    ) -> None:
        super().__init__(prompt=prompt, **settings)
        demand(self.prompt, self.where, ("response",))
        positive(self.where, n=n)
        self.n = n
        self.keep = keep
        self.keep_teacher_prompt = keep_teacher_prompt

    def __call__(self, examples: Iterable[Example]) -> Iterator[Example]:
        questions = (self.question(example, n=self.n) for example in examples)
        for question, replies in self.ask(questions):
            if question.request is None and question.problem is None:
                yield question.example
            elif replies:
                yield from self._rows(question, replies)

    def _rows(self, question: Question, replies: Sequence[Reply]) -> list[Example]:
        example = question.example
        try:
            made = [self._answered(question, record, reply) for reply, record in records(replies)]
        except BadRow as error:
            self.desk.aside(example, error.reason, str(error))
            return []
        return together(example, made, self.keep and example.response is not None)

    def _answered(self, question: Question, record: Mapping[str, Any], reply: Reply) -> Example:
        example = question.example
        meta = dict(example.meta)
        if example.response is not None:
            meta["reference"] = example.response
        if example.text is not None:
            meta["document"] = example.text
        prompt = self.prompt.for_student(example) or example.prompt
        if prompt is None and "prompt" not in record:
            raise BadRow("lacks a field", f"the row has no prompt, and {self.prompt.name} gives the student none")
        bare = replace(
            example,
            **dict.fromkeys(("text", "messages", "response", "chosen", "rejected", "score")),
            prompt=prompt,
            meta=meta,
        )
        if self.keep_teacher_prompt and question.request is not None:
            bare = replace(bare, teacher_prompt="\n\n".join(m["content"] for m in question.request.messages))
        return filled(bare, record, reply.written)
