"""The answer that most samples of a group give: Wang et al. 2023 (self-consistency), arXiv:2203.11171; Huang et al.
2023 (LMSI), arXiv:2210.11610."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, Literal

from kdcli.api import Example, Transform
from kdcli.augmentation._answers import Answers
from kdcli.augmentation._asking import groups
from kdcli.augmentation._once import once
from kdcli.augmentation._sandbox import in_order
from kdcli.augmentation._sifting import text_of
from kdcli.errors import ConfigError

GROUPS = 16  # that are compared at a time


class Vote(Transform):
    """Keeps the rows of each group that agree with its majority answer, or `one` of them: the first.

    Answers are found and compared as in `verify` (`method`, `extract`). Of equally frequent answers the one that was
    given first wins. meta.share is the share of the group's rows that gave it, rows without any answer included;
    meta.answer, where the row has none, is the answer as its first row gives it. A group below `min_share` is set
    aside.

    `method=correct` counts right answers instead: those with meta.correct, as `verify` marks them (mark=true), agree,
    and meta.share is the share of them, the expected accuracy of Yang et al. 2023 (alignment for honesty). A group
    without any keeps its first row, with a share of 0. A row without a mark is set aside.
    """

    def __init__(
        self,
        *,
        method: Literal["answer", "exact", "choice", "correct"] = "answer",
        extract: str | None = None,
        keep: Literal["agreeing", "one"] = "agreeing",
        min_share: float = 0.0,
    ) -> None:
        if keep not in ("agreeing", "one"):
            raise ConfigError(f"augmentation: vote.keep: is {keep!r}; choose agreeing or one")
        if not 0.0 <= min_share <= 1.0:
            raise ConfigError(f"augmentation: vote.min_share: is {min_share}; give a share from 0 to 1")
        if method == "correct" and extract is not None:
            raise ConfigError("augmentation: vote.extract: method=correct reads meta.correct; leave extract null")
        self.answers = None if method == "correct" else Answers(method, extract, where="augmentation: vote")
        self.settings = repr((method, extract))
        self.keep = keep
        self.min_share = min_share

    def __call__(self, examples: Iterable[Example]) -> Iterator[Example]:
        if self.answers is None:
            for group in groups(examples):
                yield from self._right(group)
            return
        source = groups(examples)
        while held := list(islice(source, GROUPS)):
            yield from self._counted(held)

    def _counted(self, held: Sequence[list[Example]]) -> Iterator[Example]:
        texts = [[text_of(example, "response") or "" for example in group] for group in held]

        def compute(missing: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
            return [poll for _, poll in in_order(missing, self._poll)]

        if self.desk.rehearsal:
            polls = [{"answer": "", "votes": list(range(len(group)))} for group in held]
        else:
            polls = once(self.desk, f"vote {self.settings}", texts, compute)
        for group, poll in zip(held, polls, strict=True):
            yield from self._kept(group, poll["answer"], poll["votes"])

    def _right(self, group: Sequence[Example]) -> Iterator[Example]:
        """The rows that are marked right, with the share of them."""
        marked: list[Example] = []
        for example in group:
            if self.desk.rehearsal or isinstance(example.meta.get("correct"), bool):
                marked.append(example)
            else:
                self.desk.aside(example, "no mark", "the row has no meta.correct; put verify with mark=true before")
        right = [place for place, example in enumerate(marked) if self.desk.rehearsal or example.meta["correct"]]
        share = len(right) / len(marked) if marked else 0.0
        kept = right or [0]
        kept = kept[:1] if self.keep == "one" else kept
        for place, example in enumerate(marked):
            if share < self.min_share:
                self.desk.aside(example, "no majority", f"the share of right answers is {share:.3f}")
            elif place in kept:
                yield replace(example, meta={**example.meta, "share": share})
            elif place in right:
                self.desk.aside(example, "one is enough", "an earlier row of the group is right, too")
            else:
                self.desk.aside(example, "wrong answer", "the row is not marked right")

    def _poll(self, texts: Sequence[str]) -> dict[str, Any]:
        """The majority's answer, and the indices of the rows that give it; None where no row gives one."""
        assert self.answers is not None
        parties: list[tuple[str, list[int]]] = []
        for place, text in enumerate(texts):
            said = self.answers.of(text)
            if said is None:
                continue
            of = next((votes for answer, votes in parties if self.answers.compare(answer, said) == "right"), None)
            if of is None:
                parties.append((said, of := []))
            of.append(place)
        answer, votes = max(parties, key=lambda party: len(party[1]), default=(None, []))
        return {"answer": answer, "votes": votes}

    def _kept(self, group: Sequence[Example], answer: str | None, votes: Sequence[int]) -> Iterator[Example]:
        share, kept = len(votes) / len(group), votes[:1] if self.keep == "one" else votes
        for place, example in enumerate(group):
            if answer is None:
                self.desk.aside(example, "no answer", "no row of the group gives an answer")
            elif share < self.min_share:
                self.desk.aside(example, "no majority", f"the most frequent answer has a share of {share:.3f}")
            elif place in kept:
                yield replace(example, meta={"answer": answer, **example.meta, "share": share})
            elif place in votes:
                self.desk.aside(example, "one is enough", "an earlier row of the group gives the same answer")
            else:
                self.desk.aside(example, "outvoted", "the group's majority gives another answer, or this row none")
