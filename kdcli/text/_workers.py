"""The work on one example, in this process or in several."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar

import numpy as np

from kdcli.api import Example
from kdcli.store.examples import BadRow, content_key
from kdcli.store.tokens import Segment
from kdcli.text.codec import Codec, Tokens
from kdcli.text.template import Draft, Template

BLOCK = 256  # examples handed to the tokenizer, or to a process, at a time


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the tokens of an example depend on, besides the tokenizer."""

    max_length: int
    split: bool  # documents that are too long are split, not truncated
    chat_template: str | None = None
    pairs: bool = False  # the rejected answer of a preference row is wanted too
    groups: bool = False  # scored answers of equal group are wanted together

    def paired(self, example: Example) -> bool:
        """Whether an example becomes two sequences, the better answer and the worse."""
        return self.pairs and example.rejected is not None

    def grouped(self, example: Example) -> bool:
        """Whether an example is one of the answers of a group, and so becomes one sequence."""
        scored = example.group is not None and example.score is not None
        return self.groups and scored and not self.paired(example)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one example. Without segments there is a `reason`; a template's refusal is a `problem` too."""

    CUT: ClassVar[str] = "cut by max_length before the response"
    CUT_PAIR: ClassVar[str] = "cut by max_length before one response of the pair"
    NO_TARGET: ClassVar[str] = "shorter than two tokens"

    where: str
    segments: tuple[Segment, ...] = ()
    truncated: int = 0  # rows that lost tokens
    group: str | None = None  # that its one segment is an answer of
    reason: str | None = None
    problem: str | None = None


def outcomes(examples: Iterable[Example], tokenizer: Any, settings: Settings, workers: int = 1) -> Iterator[Outcome]:
    """The outcome of each example, in order."""
    blocks = _blocks(examples)
    if workers == 1:
        worker = Worker(tokenizer, settings)
        for block in blocks:
            yield from worker(block)
        return
    # Spawned, because a fork of a process with threads (torch, tokenizers) may hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start, (tokenizer, settings)) as pool:
        running: deque[Future[list[Outcome]]] = deque(pool.submit(_run, block) for block in islice(blocks, 4 * workers))
        while running:
            yield from running.popleft().result()
            running.extend(pool.submit(_run, block) for block in islice(blocks, 1))


class Worker:
    """A template and a codec, ready for blocks of examples."""

    def __init__(self, tokenizer: Any, settings: Settings) -> None:
        self.template = Template(tokenizer, settings.chat_template)
        self.codec = Codec(tokenizer)
        self.settings = settings

    def __call__(self, examples: Sequence[Example]) -> list[Outcome]:
        drafts = [self._drafts(example) for example in examples]
        tokens = iter(self.codec.encode([draft for group in drafts if isinstance(group, list) for draft in group]))
        return [
            Outcome(where=example.where, reason=group.reason, problem=str(group))
            if isinstance(group, BadRow)
            else self._outcome(example, [next(tokens) for _ in group])
            for example, group in zip(examples, drafts, strict=True)
        ]

    def _drafts(self, example: Example) -> list[Draft] | BadRow:
        """What is to be tokenized; of a pair the better answer and then the worse, of a group's member the last."""
        try:
            drafts = self.template.drafts(example)
        except BadRow as refusal:
            return refusal
        if self.settings.paired(example):
            return [draft for draft in (drafts[0], drafts[0].rejected) if draft is not None]
        return drafts[-1:] if self.settings.grouped(example) else drafts

    def _outcome(self, example: Example, encoded: Sequence[Tokens]) -> Outcome:
        paired, grouped = self.settings.paired(example), self.settings.grouped(example)
        length = self.settings.max_length
        split = self.settings.split and example.kind == "text" and not grouped
        segments: list[Segment] = []
        for tokens in encoded:
            # Parts share a token: the last of one is what the first target of the next is predicted from.
            for start in range(0, max(1, len(tokens.ids) - 1), length - 1) if split else (0,):
                ids, mask = tokens.ids[start : start + length], tokens.mask[start : start + length]
                if mask[1:].any():
                    segments.append(self._segment(example, ids, mask, part=len(segments)))
        truncated = 0 if split else sum(len(tokens.ids) > length for tokens in encoded)
        if len(segments) >= 1 + paired:
            group = example.group if grouped else None
            return Outcome(where=example.where, segments=tuple(segments), truncated=truncated, group=group)
        targets = [bool(tokens.mask[1:].any()) for tokens in encoded]
        cut = Outcome.CUT_PAIR if segments else Outcome.CUT
        reason = cut if (all if paired else any)(targets) else Outcome.NO_TARGET
        return Outcome(where=example.where, truncated=truncated, reason=reason)

    def _segment(self, example: Example, ids: np.ndarray, mask: np.ndarray, *, part: int) -> Segment:
        rejected = part > 0 and self.settings.paired(example)
        return Segment(
            ids=ids,
            mask=mask,
            key=content_key(example) + ("#rejected" if rejected else f"#{part}" if part else ""),
            domain=example.domain,
            weight=example.weight,
            group=example.group,
            score=example.score,
            rejected=rejected,
        )


def _blocks(examples: Iterable[Example]) -> Iterator[list[Example]]:
    iterator = iter(examples)
    while block := list(islice(iterator, BLOCK)):
        yield block


_worker: Worker | None = None  # of a worker process


def _start(tokenizer: Any, settings: Settings) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _worker = Worker(tokenizer, settings)


def _run(examples: list[Example]) -> list[Outcome]:
    assert _worker is not None, "the process has no worker"
    return _worker(examples)
