"""The work on one example, in this process or in several."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, ClassVar, Protocol

from kdcli.api import Example, Task
from kdcli.store.examples import BadRow, content_key
from kdcli.store.tokens import Segment, TeacherTokens
from kdcli.text import view
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
    task: Task = field(default_factory=Task)

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
    APART: ClassVar[str] = "no part of the response is cut alike by both tokenizers"

    where: str
    segments: tuple[Segment, ...] = ()
    truncated: int = 0  # rows that lost tokens
    group: str | None = None  # that its one segment is an answer of
    reason: str | None = None
    problem: str | None = None


class Work(Protocol):
    """Makes outcomes of a block of examples; `given` makes another like it."""

    given: tuple[Any, Settings, Any]

    def __call__(self, examples: Sequence[Example]) -> list[Outcome]: ...


def outcomes(examples: Iterable[Example], worker: Work, workers: int = 1) -> Iterator[Outcome]:
    """The outcome of each example, in order: `worker`'s own, or that of several processes like it."""
    blocks = _blocks(examples)
    if workers == 1:
        for block in blocks:
            yield from worker(block)
        return
    # Spawned, because a fork of a process with threads (torch, tokenizers) may hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start, worker.given) as pool:
        running: deque[Future[list[Outcome]]] = deque(pool.submit(_run, block) for block in islice(blocks, 4 * workers))
        while running:
            yield from running.popleft().result()
            running.extend(pool.submit(_run, block) for block in islice(blocks, 1))


Sequences = list[tuple[Draft, Draft | None]]  # of an example: what the student sees, and the teacher if not the same


class Worker:
    """Templates and codecs, ready for blocks of examples."""

    def __init__(self, tokenizer: Any, settings: Settings, teacher_tokenizer: Any = None) -> None:
        self.given = (tokenizer, settings, teacher_tokenizer)
        self.foreign = teacher_tokenizer is not None
        self.template = Template(tokenizer, settings.chat_template)
        self.codec = Codec(tokenizer, edges=self.foreign)
        self.teacher_template = Template(teacher_tokenizer) if self.foreign else self.template
        self.teacher_codec = Codec(teacher_tokenizer, edges=True) if self.foreign else self.codec
        self.settings = settings

    def __call__(self, examples: Sequence[Example]) -> list[Outcome]:
        drafts = [self._sequences(example) for example in examples]
        flat = [pair for sequences in drafts if isinstance(sequences, list) for pair in sequences]
        own = self.codec.encode([draft for draft, _ in flat])
        other = iter(self.teacher_codec.encode([draft for _, draft in flat if draft is not None]))
        views = [self._view(*pair, tokens, other) for pair, tokens in zip(flat, own, strict=True)]
        encoded = iter(zip(own, views, strict=True))
        return [
            Outcome(where=example.where, reason=sequences.reason, problem=str(sequences))
            if isinstance(sequences, BadRow)
            else self._outcome(example, [next(encoded) for _ in sequences])
            for example, sequences in zip(examples, drafts, strict=True)
        ]

    def _sequences(self, example: Example) -> Sequences | BadRow:
        try:
            own = self._drafts(self.template, example)
            if not self.foreign and example.teacher_prompt is None:
                return [(draft, None) for draft in own]
            seen = example
            if example.teacher_prompt is not None:
                seen = replace(example, prompt=example.teacher_prompt, teacher_prompt=None)
            others = self._drafts(self.teacher_template, seen)
            if len(own) != len(others):  # one of the templates shows the answers of a conversation one by one only
                own = self._drafts(self.template, example, apart=True)
                others = self._drafts(self.teacher_template, seen, apart=True)
            return list(zip(own, others, strict=True))
        except BadRow as refusal:
            return refusal

    def _drafts(self, template: Template, example: Example, *, apart: bool = False) -> list[Draft]:
        """What is to be tokenized; of a pair the better answer and then the worse, of a group's member the last."""
        drafts = template.drafts(example, apart=apart)
        if self.settings.paired(example):
            return [draft for draft in (drafts[0], drafts[0].rejected) if draft is not None]
        return drafts[-1:] if self.settings.grouped(example) else drafts

    def _view(self, own: Draft, other: Draft | None, tokens: Tokens, encoded: Iterator[Tokens]) -> TeacherTokens | None:
        if other is None:
            return None
        if self.foreign:
            return view.other_tokenizer((own, tokens), (other, next(encoded)))
        begin = self.codec.begin or [token for token in (self.codec.eos,) if token is not None]
        return view.other_prompt(tokens, next(encoded), begin)

    def _outcome(self, example: Example, encoded: Sequence[tuple[Tokens, TeacherTokens | None]]) -> Outcome:
        paired, grouped = self.settings.paired(example), self.settings.grouped(example)
        length = self.settings.max_length
        split = self.settings.split and example.kind == "text" and not grouped
        segments: list[Segment] = []
        for tokens, seen in encoded:
            # Parts share a token: the last of one is what the first target of the next is predicted from.
            for start in range(0, max(1, len(tokens.ids) - 1), length - 1) if split else (0,):
                stop = min(start + length, len(tokens.ids))
                if tokens.mask[start + 1 : stop].any():
                    teacher = None if seen is None else view.cut(seen, start, stop)
                    segments.append(self._segment(example, tokens, slice(start, stop), teacher, part=len(segments)))
        truncated = 0 if split else sum(len(tokens.ids) > length for tokens, _ in encoded)
        apart = all(segment.teacher is not None and (segment.teacher.span < 0).all() for segment in segments)
        if len(segments) >= 1 + paired and not apart:
            group = example.group if grouped else None
            return Outcome(where=example.where, segments=tuple(segments), truncated=truncated, group=group)
        targets = [bool(tokens.mask[1:].any()) for tokens, _ in encoded]
        cut = Outcome.CUT_PAIR if segments else Outcome.CUT
        reason = cut if (all if paired else any)(targets) else Outcome.NO_TARGET
        if len(segments) >= 1 + paired:
            reason = Outcome.APART
        return Outcome(where=example.where, truncated=truncated, reason=reason)

    def _segment(
        self, example: Example, tokens: Tokens, window: slice, teacher: TeacherTokens | None, *, part: int
    ) -> Segment:
        rejected = part > 0 and self.settings.paired(example)
        return Segment(
            ids=tokens.ids[window],
            mask=tokens.mask[window],
            key=content_key(example) + ("#rejected" if rejected else f"#{part}" if part else ""),
            domain=example.domain,
            weight=example.weight,
            group=example.group,
            score=example.score,
            rejected=rejected,
            teacher=teacher,
        )


def _blocks(examples: Iterable[Example]) -> Iterator[list[Example]]:
    iterator = iter(examples)
    while block := list(islice(iterator, BLOCK)):
        yield block


def worker_of(tokenizer: Any, settings: Settings, teacher_tokenizer: Any = None) -> Work:
    """What does the work of the settings' task."""
    from kdcli.text.tasks import TaskWorker  # which imports this module

    kind = Worker if settings.task.kind == "causal" else TaskWorker
    return kind(tokenizer, settings, teacher_tokenizer)


_worker: Work | None = None  # of a worker process


def _start(tokenizer: Any, settings: Settings, teacher_tokenizer: Any) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _worker = worker_of(tokenizer, settings, teacher_tokenizer)


def _run(examples: list[Example]) -> list[Outcome]:
    assert _worker is not None, "the process has no worker"
    return _worker(examples)
