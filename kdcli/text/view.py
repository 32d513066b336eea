"""The teacher's view of a sequence: its own prompt or its own tokens, and which of them stand beside the student's."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from kdcli.store.tokens import TeacherTokens
from kdcli.text.align import NONE, align, answer_edges
from kdcli.text.codec import Tokens
from kdcli.text.template import Draft


def other_prompt(student: Tokens, teacher: Tokens, begin: list[int]) -> TeacherTokens:
    """The teacher reads another prompt before the very tokens that the student learns, one for one.

    `begin` stands in for an empty prompt: the first token of an answer is predicted from something.
    """
    first, last = _answer(student)
    prompt = teacher.ids[: _answer(teacher)[0]]
    prompt = prompt if len(prompt) else np.asarray(begin, np.int32)
    span = np.full(len(student.ids), NONE, np.int32)
    span[first:last] = np.arange(last - first)
    return TeacherTokens(
        ids=np.concatenate([prompt, student.ids[first:last]]),
        span=span,
        teacher_span=np.concatenate([np.full(len(prompt), NONE, np.int32), span[first:last]]),
    )


def other_tokenizer(student: tuple[Draft, Tokens], teacher: tuple[Draft, Tokens]) -> TeacherTokens:
    """The teacher reads the same answers in its own template and tokens; an answer that its template changes (such
    as by leaving out its thinking) has no spans."""
    drafts, tokens = (student[0], teacher[0]), (student[1], teacher[1])
    spans = [np.full(len(one.ids), NONE, np.int32) for one in tokens]
    answers = [_tokens_by_answer(draft, one) for draft, one in zip(drafts, tokens, strict=True)]
    number = 0
    for answer in range(len(drafts[0].answers) if len(drafts[0].answers) == len(drafts[1].answers) else 0):
        contents = _contents(drafts, answer)
        if contents is None:
            continue
        places = [found[answer] for found in answers]
        cuts = [
            answer_edges([one.edges[place] for place in of], *content)
            for one, of, content in zip(tokens, places, contents, strict=True)
        ]
        for span, of, found in zip(spans, places, align(*cuts), strict=True):
            span[of] = np.where(found == NONE, NONE, found + number)
        number = 1 + max(number - 1, *(int(span.max()) for span in spans))
    return TeacherTokens(ids=tokens[1].ids, span=spans[0], teacher_span=spans[1], mask=tokens[1].mask)


def cut(view: TeacherTokens, start: int, stop: int) -> TeacherTokens:
    """What of a view belongs to the student's tokens [start, stop): the spans that lie in their targets (all but the
    first), and the teacher's tokens up to the last of those, from where the student begins to read.

    A token that nothing predicts is no target, so a span that needs the first token of either side is left out.
    """
    student, teacher = (_extents(span) for span in (view.span, view.teacher_span))  # [S, 2]
    begin = 0
    if start:
        read = np.flatnonzero(student[:, 0] <= start)
        begin = int(teacher[read[-1], 0]) if len(read) else 0
    kept = (student[:, 0] > start) & (student[:, 1] <= stop) & (teacher[:, 0] > begin)
    number = np.append(np.where(kept, np.cumsum(kept) - 1, NONE), NONE).astype(np.int32)  # the last one is of NONE
    end = int(teacher[kept, 1].max()) if kept.any() else begin + 1
    return replace(
        view,
        ids=view.ids[begin:end],
        span=number[view.span[start:stop]],
        teacher_span=number[view.teacher_span[begin:end]],
        mask=None if view.mask is None else view.mask[begin:end],
    )


def _answer(tokens: Tokens) -> tuple[int, int]:
    """The places [first, last) of a sequence's one answer."""
    places = np.flatnonzero(tokens.mask)
    return (int(places[0]), int(places[-1]) + 1) if len(places) else (len(tokens.ids), len(tokens.ids))


def _tokens_by_answer(draft: Draft, tokens: Tokens) -> list[list[int]]:
    """The places of each answer's learned tokens."""
    bounds = [draft.bytes_before(end) for _, end in draft.spans]
    found: list[list[int]] = [[] for _ in bounds]
    answer = 0
    for place in np.flatnonzero(tokens.mask).tolist():
        while tokens.edges[place][0] > bounds[answer] and answer + 1 < len(bounds):
            answer += 1
        found[answer].append(place)
    return found


def _contents(drafts: tuple[Draft, Draft], answer: int) -> list[tuple[int, int]] | None:
    """Where the answer stands in both texts, as bytes; without the white space around it if a template trims that."""
    for stripped in (False, True):
        found = [draft.content(answer, stripped=stripped) for draft in drafts]
        if None not in found:
            return [
                (draft.bytes_before(place[0]), draft.bytes_before(place[1]))
                for draft, place in zip(drafts, found, strict=True)
                if place is not None
            ]
    return None


def _extents(span: np.ndarray) -> np.ndarray:
    """[S, 2]: the places [first, last) of each span's tokens."""
    places = np.flatnonzero(span != NONE)
    numbers, first = np.unique(span[places], return_index=True)
    assert np.array_equal(numbers, np.arange(len(numbers))), f"spans are counted from 0: {numbers}"
    last = np.append(first[1:], len(places)) - 1
    return np.stack([places[first], places[last] + 1], axis=1) if len(numbers) else np.zeros((0, 2), np.int64)
