"""A row's text said anew: Dai et al. 2023 (AugGPT), arXiv:2302.13007; Li et al. 2023 (Reflection-Tuning),
arXiv:2310.11716."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Unpack

from kdcli.api import Example
from kdcli.augmentation._asking import Asking, AskingSettings, Reply, filled
from kdcli.augmentation._grouped import demand
from kdcli.augmentation._making import changed, positive, records, together


class Rewrite(Asking):
    """`n` other versions of `field`, each a row with the rest as it was; the old version stands in `meta.original`.

    With `keep` the row stays before them. Several versions of a response are a group; prompts said in several ways are
    several prompts. A record may hold more than the field, such as a new prompt with its response; a text may become
    a prompt with its response.
    """

    def __init__(
        self,
        *,
        prompt: str = "rewrite/paraphrase",
        field: Literal["prompt", "response", "text"] = "prompt",
        n: int = 1,
        keep: bool = False,
        **settings: Unpack[AskingSettings],
    ) -> None:
        super().__init__(prompt=prompt, **settings)
        demand(self.prompt, self.where, (field,), *([("prompt", "response")] if field == "text" else []))
        positive(self.where, n=n)
        self.field = field
        self.n = n
        self.keep = keep

    def made(self, example: Example, replies: Sequence[Reply]) -> Iterable[Example]:
        rows = [
            filled(self._blank(example, record), {**record, "original": getattr(example, self.field)}, reply.written)
            for reply, record in records(replies)
        ]
        if self.field == "response":
            return together(example, rows, self.keep)
        return [example, *rows] if self.keep else rows

    def _blank(self, example: Example, record: Mapping[str, Any]) -> Example:
        return changed(example, text=None) if self.field == "text" and "prompt" in record else changed(example)
