"""What objectives ask of the data, the batch and the tokenizers, and which others would do without."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from kdcli.api import Data, Need, Objective, Unit

GLANCE = 1000  # rows of each domain that are looked at first
SHOWN = 8  # alternatives that a sentence names
PLACES = Need.ATTENTION | Need.RELATIONS  # compare every position with every other
OF_TEXT = Need.DISTRIBUTION | Need.LOGITS | Need.LOGPROBS | Need.HIDDEN | Need.ATTENTION | Need.RELATIONS
ROWS = {
    "rejected": "rows with chosen and rejected",
    "score": "rows with a score",
    "group": "several rows of one group, each with a score",
}


def of_batch(config: Mapping[str, Any], terms: Mapping[str, Objective]) -> list[str]:
    """Sequences that a loss compares are not packed."""
    if not config["batch"].get("packing"):
        return []
    comparing = [
        where for where, term in terms.items() if term.unit is Unit.GROUP or term.columns & {"rejected", "group"}
    ]
    return [
        f"batch.packing: {where} ({type(terms[where]).__name__}) compares sequences, which are not packed; set "
        "batch.packing=false"
        for where in comparing
    ]


def of_data(data: Data, terms: Mapping[str, Objective], source: str, given: Need) -> list[str]:
    """Rows have what terms compare: reading stops as soon as all of it has been seen. `given`: what the teacher and the
    Distiller provide, for those who look for another objective.

    Raises what reading raises.
    """
    wanting = {where: term for where, term in terms.items() if term.columns}
    unlike = {where: term for where, term in terms.items() if term.needs & PLACES}
    seen = _Seen()
    if wanting or unlike:
        _look(data, wanting.values(), seen, limit=GLANCE, whole=bool(unlike))
    if any(_lacking(term, seen) for term in wanting.values()):
        _look(data, wanting.values(), seen, limit=None, whole=False)
    problems = [
        f"{where}: {type(term).__name__} needs {_rows(lacking)}, of which the data ({source}) have none; add some, or "
        "choose an objective that does without, such as "
        + named(alternatives(lambda o, there=there: o.columns <= there and not o.needs & ~given))
        for where, term in wanting.items()
        for there in [_there(term, seen)]
        if (lacking := term.columns - there)
    ]
    return problems + [
        f"{where}: {type(term).__name__} compares every position of the models, but {seen.teacher_prompt} has a "
        "teacher_prompt, after which positions differ; leave teacher_prompt out, or choose an objective such as "
        + named(alternatives(lambda o: not o.needs & (PLACES | ~given)))
        for where, term in unlike.items()
        if seen.teacher_prompt
    ]


def of_tokenizers(terms: Mapping[str, Objective]) -> list[str]:
    """The terms that cannot compare models with different tokenizers."""
    return [
        f"{where} ({type(term).__name__})"
        for where, term in terms.items()
        if term.needs & OF_TEXT and not term.cross_tokenizer
    ]


def alternatives(suits: Callable[[type[Objective]], bool]) -> list[str]:
    """Names of the objectives whose class suits, in order."""
    import kdcli.objective

    found = []
    for module in pkgutil.iter_modules(kdcli.objective.__path__):
        if module.name.startswith("_"):
            continue
        for _, item in inspect.getmembers(importlib.import_module(f"kdcli.objective.{module.name}"), inspect.isclass):
            own = item.__module__ == f"kdcli.objective.{module.name}"
            if own and issubclass(item, Objective) and not inspect.isabstract(item) and suits(item):
                found.append(module.name)
    return list(dict.fromkeys(found))


def cross_tokenizer_names() -> str:
    """The objectives for different tokenizers, as in "uld, gold or alm"."""
    return named(alternatives(lambda objective: objective.cross_tokenizer))


@dataclass
class _Seen:
    """What rows have."""

    columns: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))  # domain -> of `ROWS`
    teacher_prompt: str = ""  # where one stands


def _look(data: Data, terms: Collection[Objective], seen: _Seen, *, limit: int | None, whole: bool) -> None:
    """Read up to `limit` rows of each domain into `seen`; unless `whole`, until the terms have what they want."""
    for name, examples in data.domains().items():
        wanted = {column for term in terms if not term.domains or name in term.domains for column in term.columns}
        found, groups = seen.columns[name], set()
        for example in islice(examples, limit):
            seen.teacher_prompt = seen.teacher_prompt or (example.teacher_prompt is not None and example.where) or ""
            if example.rejected is not None:
                found.add("rejected")
            if example.score is not None:
                found.add("score")
                if example.group in groups:
                    found.add("group")
                groups |= {example.group} - {None}
            if wanted <= found and not whole:
                break


def _lacking(term: Objective, seen: _Seen) -> frozenset[str]:
    """The columns that a term wants, and that no row of its domains has."""
    return term.columns - _there(term, seen)


def _there(term: Objective, seen: _Seen) -> frozenset[str]:
    """The columns that some row of the term's domains has."""
    return frozenset().union(
        *(found for name, found in seen.columns.items() if not term.domains or name in term.domains)
    )


def _rows(lacking: frozenset[str]) -> str:
    """Which rows are lacking, in words; those of a group have scores."""
    told = lacking - {"score"} if "group" in lacking else lacking
    return " and ".join(ROWS[column] for column in sorted(told))


def named(names: Iterable[str]) -> str:
    """As in "uld, gold or alm"."""
    shown = list(names)
    if len(shown) > SHOWN:
        return ", ".join(shown[:SHOWN]) + " …"
    return " or ".join(part for part in (", ".join(shown[:-1]), *shown[-1:]) if part)
