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


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one example. Without segments there is a `reason`; a template's refusal is a `problem` too."""

    CUT: ClassVar[str] = "cut by max_length before the response"
    NO_TARGET: ClassVar[str] = "shorter than two tokens"

    where: str
    segments: tuple[Segment, ...] = ()
    truncated: int = 0  # rows that lost tokens
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
        flat = [draft for group in drafts if isinstance(group, list) for draft in group]
        chosen = iter(self.codec.encode(flat))
        rejected = iter(self.codec.encode([draft.rejected for draft in flat if draft.rejected]))
        return [
            Outcome(where=example.where, reason=group.reason, problem=str(group))
            if isinstance(group, BadRow)
            else self._outcome(example, [(next(chosen), next(rejected) if d.rejected else None) for d in group])
            for example, group in zip(examples, drafts, strict=True)
        ]

    def _drafts(self, example: Example) -> list[Draft] | BadRow:
        try:
            return self.template.drafts(example)
        except BadRow as refusal:
            return refusal

    def _outcome(self, example: Example, encoded: Sequence[tuple[Tokens, Tokens | None]]) -> Outcome:
        length, key = self.settings.max_length, content_key(example)
        split = self.settings.split and example.kind == "text"
        segments, truncated = [], 0
        for tokens, rejected in encoded:
            truncated += len(tokens.ids) > length and not split
            # Parts share a token: the last of one is what the first target of the next is predicted from.
            for start in range(0, max(1, len(tokens.ids) - 1), length - 1) if split else (0,):
                ids, mask = tokens.ids[start : start + length], tokens.mask[start : start + length]
                if mask[1:].any():
                    segments.append(
                        Segment(
                            ids=ids,
                            mask=mask,
                            key=f"{key}#{len(segments)}" if segments else key,
                            domain=example.domain,
                            weight=example.weight,
                            group=example.group,
                            score=example.score,
                            rejected=None if rejected is None else (rejected.ids[:length], rejected.mask[:length]),
                        )
                    )
        had_targets = any(tokens.mask[1:].any() for tokens, _ in encoded)
        reason = None if segments else Outcome.CUT if had_targets else Outcome.NO_TARGET
        return Outcome(where=example.where, segments=tuple(segments), truncated=truncated, reason=reason)


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
