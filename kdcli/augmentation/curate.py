"""Rows from what is no prompt yet, such as topics, documents, triples and code: Ding et al. 2023 (UltraChat),
arXiv:2305.14233; Wei et al. 2023 (OSS-Instruct), arXiv:2312.02120."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Unpack

from kdcli.api import Example
from kdcli.augmentation._asking import Asking, AskingSettings, Reply, child
from kdcli.augmentation._grouped import demand
from kdcli.augmentation._making import inherited, positive, records
from kdcli.store.examples import BadRow


class Curate(Asking):
    """Each record of `n` answers about a row is a new row; `keep_source` keeps the row before them.

    A new row inherits the row's columns but for those about its own text, and its text as `meta.document`. Its prompt
    is the record's, or the prompt file's `student`, where the record's fields may be named as `record.NAME`.
    """

    extra = ("record",)

    def __init__(
        self,
        *,
        prompt: str = "curate/question",
        n: int = 1,
        keep_source: bool = False,
        **settings: Unpack[AskingSettings],
    ) -> None:
        super().__init__(prompt=prompt, **settings)
        if "student" not in self.prompt.content:
            demand(self.prompt, self.where, ("prompt",), ("messages",), ("text",))
        positive(self.where, n=n)
        self.n = n
        self.keep_source = keep_source

    def made(self, example: Example, replies: Sequence[Reply]) -> Iterator[Example]:
        if self.keep_source:
            yield example
        for reply, record in records(replies):
            try:
                prompt = self.prompt.for_student(example, record=record)
            except BadRow as error:
                self.desk.aside(example, error.reason, str(error), reply.text)
                continue
            whole = dict(record) if prompt is None else {**record, "prompt": prompt}
            yield child([example], whole, reply.written, meta=inherited(example))
