"""What a local causal language model thinks of a text: its log-probability after a prefix, each text once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from kdcli.api import Desk, Example, Need
from kdcli.augmentation._once import once
from kdcli.errors import ConfigError
from kdcli.ops.chunked import chunk_size, map_chunks
from kdcli.ops.head import Head
from kdcli.store.examples import BadRow
from kdcli.store.layers import run
from kdcli.store.models import load_model, load_tokenizer, real_ids
from kdcli.store.weights import model_fingerprint
from kdcli.text.template import Template

Text = tuple[str, str]  # what stands before, and what is scored


@dataclass(frozen=True)
class Scored:
    """Log-probability of a text, in nats, and of how many of its tokens."""

    logprob: float
    tokens: int

    @property
    def mean(self) -> float:
        return self.logprob / self.tokens


class LM:
    """Scores texts after prefixes. Both are tokenized on their own, so that the tokens that are scored are the same
    whatever stands before; in front stands the tokenizer's begin token, or else its end token.

    The prefix is cut at its beginning, and then the text at its end, to `max_length` tokens. Weights load with the
    first text that is not known. Padding is masked, so that what stands in a batch together does not matter.
    """

    def __init__(
        self, path: str, *, revision: str | None, dtype: str, device: str | None, batch: int, max_length: int
    ) -> None:
        self.path, self.revision, self.dtype = path, revision, dtype
        self.device = device_of(device)
        self.batch = batch
        self.max_length = max_length

    def check(self) -> None:
        """Refuse a model that is not there, or whose tokenizer cannot begin a text, before its weights load."""
        _ = self._begin

    def texts(self, example: Example) -> Text:
        """What the model sees of prompt and response, or of the last turn of a chat, in its chat template. Raises
        BadRow."""
        if example.text is not None:
            return "", example.text
        if example.response is None and example.messages is None and example.chosen is None:
            raise BadRow("lacks a field", "the row has no response to score")
        draft = self._template.drafts(example)[-1]
        start, end = draft.spans[-1]
        return draft.text[:start], draft.text[start:end]

    def scores(self, desk: Desk, texts: Sequence[Text]) -> list[Scored | None]:
        """Of each text; None for one that has no token, or no finite number. Each is computed once per weights, as
        `desk` remembers them."""
        found = once(desk, self._kind, texts, self._computed)
        return [Scored(logprob, tokens) if tokens else None for logprob, tokens in found]

    def fingerprint(self) -> str:
        return model_fingerprint(self.path, self.dtype, self.revision)

    @torch.no_grad()
    def _computed(self, texts: Sequence[Text]) -> list[tuple[float, int]]:
        rows = [self._ids(*text) for text in texts]
        found = [(0.0, 0)] * len(texts)
        kept = [place for place, (_, count) in enumerate(rows) if count]
        for places in sorted_batches([len(rows[place][0]) for place in kept], self.batch):
            chosen = [kept[place] for place in places]
            sums = self._sums([rows[place] for place in chosen])
            for place, value in zip(chosen, sums, strict=True):
                if math.isfinite(value):
                    found[place] = (value, rows[place][1])
        return found

    def _ids(self, prefix: str, text: str) -> tuple[list[int], int]:
        """Ids, and how many of the last are scored."""
        before = self._tokenizer(prefix, add_special_tokens=False)["input_ids"] if prefix else []
        own = self._tokenizer(text, add_special_tokens=False)["input_ids"][: self.max_length - 1]
        if not before or before[0] != self._begin:  # a chat template may have written it
            before = [self._begin, *before]
        room = self.max_length - len(own)
        if len(before) > room:
            before = [before[0], *before[len(before) - room + 1 :]]
        return before + own, len(own)

    def _sums(self, rows: Sequence[tuple[list[int], int]]) -> list[float]:
        ids, mask = pad([ids for ids, _ in rows], 0, self.device)
        inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        hidden = run(self._model, inputs, Need.DISTRIBUTION).hidden
        scored = torch.zeros_like(mask)  # [B, T], at the position that predicts
        for row, (one, count) in enumerate(rows):
            scored[row, len(one) - count - 1 : len(one) - 1] = 1
        chosen = scored.bool()
        targets = ids.roll(-1, 1)[chosen]

        def logprobs(states: Tensor, wanted: Tensor) -> Tensor:
            return self._head(states).log_softmax(-1).gather(-1, wanted[:, None])[:, 0]

        size = chunk_size(self._head.vocab_size, hidden.device)
        values = map_chunks(logprobs, size, hidden[chosen], targets)  # [N] float32
        return [float(part.double().sum()) for part in values.split(chosen.sum(1).tolist())]

    @cached_property
    def _kind(self) -> str:
        return f"lm {self.fingerprint()} {self.max_length}"

    @cached_property
    def _begin(self) -> int:
        for token in (self._tokenizer.bos_token_id, self._tokenizer.eos_token_id):
            if token is not None:
                return token
        raise ConfigError(f"{self.path}: its tokenizer has neither a begin nor an end token to put before a text")

    @cached_property
    def _tokenizer(self) -> Any:
        return load_tokenizer(self.path, revision=self.revision)

    @cached_property
    def _template(self) -> Template:
        return Template(self._tokenizer)

    @cached_property
    def _model(self) -> Any:
        model = load_model(self.path, dtype=self.dtype, device=self.device, revision=self.revision)
        return model.requires_grad_(False)

    @cached_property
    def _head(self) -> Head:
        return Head.of(self._model, real_ids(self._tokenizer))


def device_of(name: str | None) -> torch.device:
    """A device by its name; None: a GPU where there is one."""
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def sorted_batches(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, the longest first, so that too little memory shows at once."""
    order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    for start in range(0, len(order), size):
        yield order[start : start + size]


def pad(rows: Sequence[Sequence[int]], padding: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """[B, T] ids, padded on the right, and their mask."""
    length = max(1, *map(len, rows))
    ids = torch.tensor([[*one, *[padding] * (length - len(one))] for one in rows], device=device)
    return ids, torch.tensor([[1] * len(one) + [0] * (length - len(one)) for one in rows], device=device)
