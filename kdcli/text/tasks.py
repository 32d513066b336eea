"""The work on one example where a model does not simply go on with a text: labels, responses, states.

Every row is the prompt with the tokenizer's special tokens, and behind it what is predicted: the index of the label,
or the response's tokens with those that the tokenizer puts around a target. Of an encoding each token of the prompt is
a target's place, and the last id of a row stands for nothing.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kdcli.api import Example, Task
from kdcli.errors import ConfigError
from kdcli.store.examples import BadRow, content_key
from kdcli.store.tokens import Segment, TeacherTokens
from kdcli.text._workers import Outcome, Settings
from kdcli.text.align import NONE

SHOWN = 20  # labels that a sentence names


@dataclass(frozen=True)
class Wanted:
    """The texts of an example that are tokenized; `seen` is what the teacher reads, where that is something else."""

    prompt: str
    seen: str | None = None
    responses: tuple[str, ...] = ()


def texts_of(example: Example, task: Task, *, paired: bool = False, foreign: bool = False) -> Wanted:
    """What is tokenized; `paired`: both answers of a pair, `foreign`: the teacher has another tokenizer. Raises BadRow
    for an example that this task cannot use."""
    if task.kind == "encoding":
        if example.text is None and example.prompt is None:
            raise BadRow("no prompt", "student=encoder reads rows of text, or of prompt; write this row as text")
        return Wanted(example.text if example.text is not None else example.prompt or "")
    if example.prompt is None:
        what = "the label's name" if task.kind == "classification" else "what is to be written"
        form = "messages" if example.messages is not None else "text"
        raise BadRow("no prompt", f"the row has {form}, but this student reads prompt + response ({what})")
    seen = example.teacher_prompt
    seen = example.prompt if seen is None and foreign else seen
    if task.kind == "classification":
        if example.response is None:
            raise BadRow("preference", "the row has chosen and rejected, but a classifier learns prompt + response")
        label_of(example, task.labels)
        return Wanted(example.prompt, seen)
    responses = [example.response if example.rejected is None else example.chosen]
    return Wanted(example.prompt, seen, tuple(text or "" for text in responses + [example.rejected] * paired))


def label_of(example: Example, labels: Sequence[str]) -> int:
    """The index of the label that a row's response names. Raises BadRow where it names none."""
    label = (example.response or "").strip()
    if label not in labels:
        close = difflib.get_close_matches(label.casefold(), [name.casefold() for name in labels], n=1)
        near = next((name for name in labels if close and name.casefold() == close[0]), None)
        raise BadRow("no label", f"response is {label[:60]!r}, which is no label; {_hint(near, labels)}")
    return labels.index(label)


class TaskWorker:
    """Tokenizers, ready for blocks of examples: `Worker` for other tasks than `causal`."""

    def __init__(self, tokenizer: Any, settings: Settings, teacher_tokenizer: Any = None) -> None:
        self.given = (tokenizer, settings, teacher_tokenizer)
        self.settings = settings
        self.kind = settings.task.kind
        self.own = Wrapped(tokenizer)
        self.response = Wrapped(tokenizer, target=True) if self.kind == "seq2seq" else None
        self.foreign = teacher_tokenizer is not None
        self.other = Wrapped(teacher_tokenizer) if self.foreign else self.own
        least = self.own.special + (self.response.special if self.response is not None else 1) + 2
        if settings.max_length < least:
            raise ConfigError(f"batch.max_length is {settings.max_length}; these rows need at least {least} tokens")

    def __call__(self, examples: Sequence[Example]) -> list[Outcome]:
        wanted = [self._wanted(example) for example in examples]
        good = [one for one in wanted if isinstance(one, Wanted)]
        prompts = iter(self.own.ids([one.prompt for one in good]))
        seen = iter(self.other.ids([one.seen for one in good if one.seen is not None]))
        said = iter(self.response.ids([text for one in good for text in one.responses]) if self.response else ())
        outcomes = []
        for example, one in zip(examples, wanted, strict=True):
            if isinstance(one, BadRow):
                outcomes.append(Outcome(where=example.where, reason=one.reason, problem=str(one)))
                continue
            prompt, view = next(prompts), next(seen) if one.seen is not None else None
            outcomes.append(self._outcome(example, prompt, view, [next(said) for _ in one.responses]))
        return outcomes

    def _wanted(self, example: Example) -> Wanted | BadRow:
        try:
            return texts_of(example, self.settings.task, paired=self.settings.paired(example), foreign=self.foreign)
        except BadRow as refusal:
            return refusal

    def _outcome(
        self, example: Example, prompt: list[int], seen: list[int] | None, responses: list[list[int]]
    ) -> Outcome:
        if self.kind == "encoding":
            return self._states(example, prompt)
        answers = (
            [self.response.wrapped(ids) for ids in responses]
            if self.response
            else [[label_of(example, self.settings.task.labels)]]
        )
        segments, truncated = [], 0
        for number, answer in enumerate(answers):
            ids, kept = self._fitted(self.own, prompt, answer)
            truncated += kept
            teacher = None
            if seen is not None:
                (before, _), _ = self._fitted(self.other, seen, ids[1])
                teacher = _view(before, ids)
            segments.append(self._segment(example, ids, teacher, rejected=number > 0))
        if not all(segment.mask[1:].any() for segment in segments):
            return Outcome(where=example.where, reason=Outcome.NO_TARGET)
        group = example.group if self.settings.grouped(example) else None
        return Outcome(where=example.where, segments=tuple(segments), truncated=truncated, group=group)

    def _fitted(
        self, tokenizer: Wrapped, prompt: list[int], answer: list[int]
    ) -> tuple[tuple[list[int], list[int]], bool]:
        """Prompt and answer within max_length: the prompt is cut at its end down to half of it, and then the answer."""
        length = self.settings.max_length
        room = max(length - len(answer), length - length // 2)
        cut = tokenizer.wrapped(prompt[: max(0, room - tokenizer.special)])
        answer_cut = answer[: length - len(cut)]
        lost = len(cut) < len(prompt) + tokenizer.special or len(answer_cut) < len(answer)
        return (cut, answer_cut), lost

    def _states(self, example: Example, prompt: list[int]) -> Outcome:
        """Every token is a target; a text that is too long is cut into parts, or at its end."""
        room = self.settings.max_length - 1 - self.own.special
        split = self.settings.split and example.kind == "text"
        parts = [prompt[start : start + room] for start in range(0, max(1, len(prompt)), room)]
        segments = []
        for part in parts if split else parts[:1]:
            segments.append(self._segment(example, (self.own.wrapped(part), [0]), None, part=len(segments)))
        if not any(segment.mask[1:].any() for segment in segments):
            return Outcome(where=example.where, reason=Outcome.NO_TARGET)
        return Outcome(where=example.where, segments=tuple(segments), truncated=int(not split and len(parts) > 1))

    def _segment(
        self,
        example: Example,
        ids: tuple[list[int], list[int]],
        teacher: TeacherTokens | None,
        *,
        part: int = 0,
        rejected: bool = False,
    ) -> Segment:
        prompt, answer = ids
        mask = np.ones(len(prompt) + len(answer), bool)
        mask[: len(prompt)] = self.kind == "encoding"
        return Segment(
            ids=np.asarray(prompt + answer, np.int32),
            mask=mask,
            key=content_key(example) + ("#rejected" if rejected else f"#{part}" if part else ""),
            domain=example.domain,
            weight=example.weight,
            group=example.group,
            score=example.score,
            rejected=rejected,
            teacher=teacher,
        )


class Wrapped:
    """A tokenizer, and the special tokens that it puts around a text; `target`: around one that is to be written."""

    def __init__(self, tokenizer: Any, *, target: bool = False) -> None:
        self.tokenizer = tokenizer
        self.name = "text_target" if target else "text"
        plain, full = self._call(["x"], False)[0], self._call(["x"], True)[0]
        places = [i for i in range(len(full)) if full[i : i + len(plain)] == plain]
        if not plain or not places:
            raise ConfigError(
                f"{type(tokenizer).__name__} changes a text when it adds special tokens; take another model"
            )
        self.begin, self.end = full[: places[0]], full[places[0] + len(plain) :]
        self.special = len(self.begin) + len(self.end)

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Each text's own ids."""
        return self._call(list(texts), False) if texts else []

    def wrapped(self, ids: list[int]) -> list[int]:
        return [*self.begin, *ids, *self.end]

    def _call(self, texts: list[str], special: bool) -> list[list[int]]:
        output = self.tokenizer(
            **{self.name: texts}, add_special_tokens=special, return_attention_mask=False, verbose=False
        )
        return [list(ids) for ids in output["input_ids"]]


def _view(prompt: list[int], ids: tuple[list[int], list[int]]) -> TeacherTokens:
    """The teacher's prompt before the student's answer, token for token."""
    before, answer = ids
    number = np.arange(len(answer), dtype=np.int32)

    def behind(length: int) -> np.ndarray:
        return np.concatenate([np.full(length, NONE, np.int32), number])

    return TeacherTokens(
        ids=np.asarray(prompt + answer, np.int32), span=behind(len(before)), teacher_span=behind(len(prompt))
    )


def _hint(near: str | None, labels: Sequence[str]) -> str:
    if near is not None:
        return f"did you mean {near}?"
    more = f" and {len(labels) - SHOWN} more" if len(labels) > SHOWN else ""
    return f"the labels are {', '.join(labels[:SHOWN])}{more}"
