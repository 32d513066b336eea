"""Marks put into a given text, such as calls of tools: Schick et al. 2023 (Toolformer), arXiv:2302.04761."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Literal, Unpack

from kdcli.api import Example
from kdcli.augmentation._asking import Asking, AskingSettings, Reply, filled
from kdcli.augmentation._grouped import demand
from kdcli.augmentation._making import changed, positive, records, together
from kdcli.errors import ConfigError


class Annotate(Asking):
    """`n` marked versions of `field`; the old one stands in `meta.original`. Without the matches of `strip` a marked
    version must be the old one, white space apart, or it is set aside. Several are a group."""

    def __init__(
        self,
        *,
        prompt: str = "annotate/tool_calls",
        field: Literal["text", "response"] = "text",
        strip: str | None = None,
        n: int = 1,
        **settings: Unpack[AskingSettings],
    ) -> None:
        super().__init__(prompt=prompt, **settings)
        demand(self.prompt, self.where, (field,))
        positive(self.where, n=n)
        self.field = field
        self.n = n
        try:
            self.strip = None if strip is None else re.compile(strip, re.DOTALL)
        except re.error as error:
            raise ConfigError(f"{self.where}.strip: {strip!r} is no regular expression: {error}") from None

    def made(self, example: Example, replies: Sequence[Reply]) -> Iterable[Example]:
        rows = []
        original = getattr(example, self.field)
        for reply, record in records(replies):
            if self._is_other(original or "", str(record[self.field])):
                detail = f"without what strip matches, the marked {self.field} is not the old one"
                self.desk.aside(example, "changed the text", detail, reply.text)
                continue
            rows.append(filled(changed(example), {**record, "original": original}, reply.written))
        return together(example, rows, keep=False)

    def _is_other(self, original: str, marked: str) -> bool:
        if self.strip is None or self.desk.rehearsal:
            return False
        return "".join(self.strip.sub("", marked).split()) != "".join(original.split())
