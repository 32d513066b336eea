"""The settings, spreads and kinds of data that checks go through."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from kdcli.api import Scope
from kdcli.train.conformance.candidate import Candidate
from kdcli.train.conformance.case import Case, case, selected


def kinds(candidate: Candidate, changes: Mapping[str, Any] | None = None, spread: float = 2.0) -> Iterator[Case]:
    """The usual case, and other data that the objective may meet: no other tokenizer, text that no policy wrote, and
    scored groups in place of pairs."""
    objective = candidate.make(**(changes or {}))
    yield case(candidate, changes, spread=spread)
    if objective.scope is Scope.CHUNK:
        return
    if objective.cross_tokenizer:
        yield case(candidate, changes, foreign=False)
    if objective.scope is Scope.LOGPROBS:
        at = case(candidate, changes)
        yield replace(at, batch=replace(at.batch, old_logprobs=None))
    if objective.columns & {"rejected", "score", "group"}:
        for columns in ({"rejected"}, {"score", "group"}):
            if columns != objective.columns:
                at = case(candidate, changes, columns=columns | objective.columns)
                if selected(objective, at).any():
                    yield at


def settings_and_spreads(candidate: Candidate, *spreads: float) -> Iterator[tuple[dict[str, Any], float]]:
    """Every variant with every spread; of a whole micro-batch, which costs more, a changed setting with the first."""
    for changes in candidate.variants():
        few = bool(changes) and candidate.example.scope is not Scope.CHUNK
        yield from ((changes, spread) for spread in (spreads[:1] if few else spreads))


def parts(at: Case) -> Iterator[Case]:
    """Each target of a chunk, or each group of a micro-batch, alone."""
    if at.student.logits is not None:
        yield from (at.targets(slice(i, i + 1)) for i in range(at.z.shape[1]))
        return
    groups = at.batch.groups().tolist()
    for group in range(max(groups) + 1):
        yield at.sequences([i for i, known in enumerate(groups) if known == group])
