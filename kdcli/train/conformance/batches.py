"""Batches of every kind: answers of different lengths behind a prompt, preference pairs, scored groups, and a teacher
whose tokenizer cuts the same letters otherwise.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from kdcli.api import Batch, TeacherView

END = "</s>"
SHARED = (*"abcdefgh", "ab", "cd", "ef", END)
OWN = ("gh", "ac", "bd", "eg", "fh")  # pairs of letters that are one token
THEIRS = ("bc", "de", "fg", "ha", "ce", "db", "ge", "af", "ca")


class ToyTokenizer:
    """The part of a transformers tokenizer that objectives may ask of: which id stands for which letters."""

    eos_token = END
    all_special_tokens: Sequence[str] = (END,)

    def __init__(self, tokens: Sequence[str], seed: int) -> None:
        self.tokens = list(tokens)
        random.Random(seed).shuffle(self.tokens)
        self.ids = {token: index for index, token in enumerate(self.tokens)}

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def eos_token_id(self) -> int:
        return self.ids[END]

    @property
    def all_special_ids(self) -> list[int]:
        return [self.ids[END]]

    def get_vocab(self) -> dict[str, int]:
        return dict(self.ids)

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        return [self.tokens[index] for index in ids]

    def convert_tokens_to_ids(self, tokens: Sequence[str]) -> list[int]:
        return [self.ids[token] for token in tokens]

    def decode(self, ids: Sequence[int], **options: object) -> str:
        return "".join(self.convert_ids_to_tokens(ids))


STUDENT, TEACHER = ToyTokenizer((*SHARED, *OWN), seed=1), ToyTokenizer((*SHARED, *THEIRS), seed=2)
VOCAB, FOREIGN_VOCAB = len(STUDENT), len(TEACHER)  # 17 and 21


@dataclass
class _Text:
    """One sequence as both tokenizers cut it: per target its span, -1 in the prompt and where none is."""

    own: list[int]
    theirs: list[int]
    spans: list[int]
    their_spans: list[int]
    prompt: int
    their_prompt: int


def batch(
    rows: int = 4,
    seed: int = 7,
    *,
    columns: Collection[str] = (),
    foreign: bool = False,
    identical: bool = False,
) -> Batch:
    """Padded on the right. `columns`: what an objective wants of the data. `foreign`: with the view of a teacher of
    another tokenizer; `identical`: of one whose tokenizer is the student's after all."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    groups = _groups(rows, columns)
    texts = [_text(draw, number, identical) for number in range(rows)]
    length = max(len(text.own) for text in texts) - 1
    ids, targets = (_padded([text.own[cut] for text in texts], length) for cut in (slice(0, -1), slice(1, None)))
    attention = _padded([[1] * (len(text.own) - 1) for text in texts], length).bool()
    prompt = torch.tensor([[text.prompt] for text in texts])
    answers = attention & (torch.arange(length) >= prompt - 1)
    grouped = bool({"rejected", "group"} & set(columns))
    first = [groups.index(group) for group in groups]
    return Batch(
        input_ids=ids,
        targets=targets,
        mask=answers,
        attention_mask=attention,
        segment=torch.arange(rows).unsqueeze(1).expand(rows, length).masked_fill(~attention, -1),
        weight=torch.tensor([(1.0, 0.5, 2.0, 1.0)[group % 4] for group in groups]),
        row=[str(i) for i in range(rows)],
        domain=["default"] * rows,
        group=[str(group) for group in groups] if "group" in columns else [None] * rows,
        score=[round(draw.uniform(-2, 2), 3) for _ in range(rows)] if "score" in columns else [None] * rows,
        rejected=torch.tensor([i != j for i, j in enumerate(first)]) if "rejected" in columns else None,
        group_index=torch.tensor(groups) if grouped else None,
        old_logprobs=-(0.1 + 3 * torch.rand(rows, length, generator=generator)) * answers,
        teacher=_view(texts, answers) if foreign else None,
    )


def cuts(whole: Batch) -> list[int]:
    """Where rows may be cut into micro-batches: before each group, and at the end."""
    groups = whole.groups().tolist()
    return [i for i, group in enumerate(groups) if i == 0 or group != groups[i - 1]] + [len(groups)]


def _groups(rows: int, columns: Collection[str]) -> list[int]:
    """Pairs with single answers between them; groups of three, one and two; or each answer on its own."""
    sizes = (2, 1) if "rejected" in columns else (3, 1, 2) if "group" in columns else (1,)
    groups = [number for number, size in enumerate(sizes * rows) for _ in range(size)]
    return groups[:rows]


def _text(draw: random.Random, number: int, identical: bool) -> _Text:
    """A prompt and an answer of 3 to 6 spans; every third is cut off, so that its last token has no counterpart."""
    prompt, their_prompt = ([draw.choice("abcdefgh") for _ in range(size)] for size in (2, 3))
    pieces = [_piece(draw) for _ in range(4 + (number * 2) % 3)]
    whole = number % 3 != 2
    last = ([END], [END]) if whole else (["gh"], ["g"])
    own = [token for piece, _ in pieces for token in piece] + last[0]
    theirs = [token for _, piece in pieces for token in piece] + last[1]
    spans, their_spans = ([i for i, piece in enumerate(pieces) for _ in piece[side]] for side in (0, 1))
    ends = [len(pieces)] if whole else [-1]
    text = _Text(
        STUDENT.convert_tokens_to_ids([*prompt, *own]),
        TEACHER.convert_tokens_to_ids([*their_prompt, *theirs]),
        [-1, *spans, *ends],
        [-1, -1, *their_spans, *ends],
        len(prompt),
        len(their_prompt),
    )
    if identical:
        text.theirs, text.their_prompt = text.own, text.prompt
        text.spans = text.their_spans = [-1, *range(len(own))]
    return text


def _piece(draw: random.Random) -> tuple[list[str], list[str]]:
    """One span: the tokens of the student and of the teacher for the same letters."""
    kind = draw.randrange(6)
    if kind < 3:
        shared = draw.choice(SHARED[:-1])
        return [shared], [shared]
    if kind == 3:
        pair = draw.choice(OWN)
        return [pair], list(pair)
    if kind == 4:
        pair = draw.choice(THEIRS)
        return list(pair), [pair]
    return ["ab", "c"], ["a", "bc"]


def _view(texts: Sequence[_Text], answers: Tensor) -> TeacherView:
    length, own_length = answers.shape[1], max(len(text.theirs) for text in texts) - 1
    starts = [0, *accumulate(1 + max(text.spans) for text in texts)]
    span, their_span = (torch.full((len(texts), size), -1) for size in (length, own_length))
    position = torch.full((len(texts), length), -1)
    for b, text in enumerate(texts):
        for row, known in ((span[b], text.spans), (their_span[b], text.their_spans)):
            row[: len(known)] = torch.tensor([s if s < 0 else s + starts[b] for s in known])
        for t, number in enumerate(text.spans):
            if number >= 0 and (t == 0 or text.spans[t - 1] != number):
                position[b, t] = text.their_spans.index(number)
    ids, targets = (_padded([text.theirs[cut] for text in texts], own_length) for cut in (slice(0, -1), slice(1, None)))
    attention = _padded([[1] * (len(text.theirs) - 1) for text in texts], own_length).bool()
    prompt = torch.tensor([[text.their_prompt] for text in texts])
    return TeacherView(
        input_ids=ids,
        attention_mask=attention,
        position=position,
        targets=targets,
        mask=attention & (torch.arange(own_length) >= prompt - 1),
        span=span,
        teacher_span=their_span,
    )


def _padded(lists: Sequence[Sequence[int]], length: int) -> Tensor:
    return torch.tensor([[*one, *[0] * (length - len(one))] for one in lists])
