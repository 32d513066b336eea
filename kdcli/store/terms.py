"""What licences and providers' terms say about training on text: configs/terms.yaml, a table that users can edit.

It helps to keep records and to notice a conflict early. It is no legal advice: rows are short readings of long texts,
each dated and with the address of the text that holds. Rows of ./configs/terms.yaml come before the packaged ones.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from difflib import get_close_matches
from typing import Any

from kdcli.errors import ConfigError
from kdcli.store.terms_table import QUESTIONS, STRICTER, UNKNOWN, Row, Terms, files, fingerprint, normal, table

__all__ = [
    "NO_ADVICE",
    "QUESTIONS",
    "STRICTER",
    "UNKNOWN",
    "USES",
    "Terms",
    "cautions",
    "conflicts",
    "files",
    "fingerprint",
    "joined",
    "terms_of",
]

USES = {  # a declared use -> what must be allowed for it
    "research": ("outputs_may_train",),
    "commercial": ("outputs_may_train", "commercial"),
    "competing": ("outputs_may_train", "commercial", "competing_models"),
}
NO_ADVICE = "the table of terms is a record-keeping aid and no legal advice"


def terms_of(
    license: str | Sequence[str] | None = None,
    endpoint: str | None = None,
    model: str | None = None,
    given: str | None = None,
) -> Terms:
    """What holds for text: the row named by `given`, else that of the endpoint's host joined with that of the licence
    or, where none is stated, of the model's name. `UNKNOWN` where nothing fits.

    `license` is an SPDX name or expression, free text such as `public domain (data CC0-1.0)`, or several of them.
    Raises ConfigError where `given` is no row, or the table is broken.
    """
    rows = table()
    if given:
        return _by_id(given, rows)
    found = [r.terms for r in rows if endpoint and _host(endpoint) and _host_fits(_host(endpoint), r.hosts)][:1]
    if license:
        found += [_of_text(one, rows) for one in ([license] if isinstance(license, str) else license)]
    elif model:
        found += [r.terms for r in rows if _model_fits(model, r.models)][:1]
    return joined(found)


def joined(found: Iterable[Terms]) -> Terms:
    """All of these hold at once: the strictest answers; `UNKNOWN` of none."""
    distinct = list(dict.fromkeys(found))
    if len(distinct) < 2:
        return distinct[0] if distinct else UNKNOWN
    kinds = {one.kind for one in distinct}

    def strictest(question: str) -> Any:
        return max((getattr(one, question) for one in distinct), key=STRICTER.index)

    def together(name: str) -> str:
        return "; ".join(dict.fromkeys(str(getattr(one, name)) for one in distinct if getattr(one, name)))

    return Terms(
        id="+".join(dict.fromkeys(part for one in distinct for part in one.id.split("+"))),
        kind=kinds.pop() if len(kinds) == 1 else "joined",
        **{question: strictest(question) for question in QUESTIONS},
        share_alike=any(one.share_alike for one in distinct),
        attribution=together("attribution"),
        naming=together("naming"),
        source=together("source"),
        checked_on=min((one.checked_on for one in distinct if one.checked_on), default=""),
        verified=all(one.verified for one in distinct),
        note=together("note"),
    )


def conflicts(use: str | None, acknowledged: Collection[str], found: Iterable[tuple[str, str, Terms]]) -> list[str]:
    """A sentence for each of `found` (kind such as teacher or data, name, terms) whose terms say no to `use`.

    Empty while no use is declared. What is `acknowledged` (ids of rows) is the user's own affair: an agreement with the
    provider, say. Raises ConfigError for a use that there is not.
    """
    return list(_sentences(use, acknowledged, found, ("no",))) if use is not None else []


def cautions(use: str | None, acknowledged: Collection[str], found: Iterable[tuple[str, str, Terms]]) -> list[str]:
    """Like `conflicts`, for what is conditional or unknown; while no use is declared, also for what any use forbids."""
    return list(_sentences(use, acknowledged, found, ("conditional", "unknown") if use else STRICTER[1:]))


def _sentences(
    use: str | None, acknowledged: Collection[str], found: Iterable[tuple[str, str, Terms]], answers: Collection[str]
) -> Iterator[str]:
    if use is not None and use not in USES:
        raise ConfigError(f"use is {use}; declare one of {', '.join(USES)}")
    asked = USES[use] if use else tuple(QUESTIONS)
    for kind, name, terms in dict.fromkeys(found):
        if all(part in acknowledged for part in terms.id.split("+")):
            continue
        hit = [question for question in asked if getattr(terms, question) in answers]
        if hit:
            yield _sentence(use, kind, name, terms, hit)


def _sentence(use: str | None, kind: str, name: str, terms: Terms, hit: Sequence[str]) -> str:
    said = {answer: [QUESTIONS[q] for q in hit if getattr(terms, q) == answer] for answer in reversed(STRICTER)}
    words = {"no": "forbids {}", "unknown": "is not known to allow {}", "conditional": "sets conditions for {}"}
    parts = " and ".join(words[answer].format(", ".join(what)) for answer, what in said.items() if what)
    rules = "; ".join(part for part in (terms.attribution, terms.naming) if part)
    rules += ("; " if rules else "") + "share alike" if terms.share_alike else ""
    read = f"checked {terms.checked_on}{'' if terms.verified else ', unverified'}" if terms.checked_on else "no row"
    return (
        f"{kind} {name}: {terms.id} ({read}) {parts}{f', for use={use}' if use else ''}"
        f"{f' ({rules})' if rules else ''}; "
        f"{f'read {terms.source}, then ' if terms.source else 'state its licence or its row of terms, '}"
        f"change the source or the use, or acknowledge {terms.id}; {NO_ADVICE}"
    )


def _by_id(given: str, rows: Sequence[Row]) -> Terms:
    known = {row.terms.id: row.terms for row in rows} | {UNKNOWN.id: UNKNOWN}
    parts = given.split("+")
    for part in parts:
        if part not in known:
            near = get_close_matches(part, known, n=1)
            raise ConfigError(
                f"terms: the table has no row {part}{f'; did you mean {near[0]}?' if near else ''} "
                f"(there are {', '.join(known)}; add your own to ./configs/terms.yaml)"
            )
    return joined(known[part] for part in parts)


def _of_text(stated: str, rows: Sequence[Row]) -> Terms:
    """The terms of a licence as people state it. Of `A OR B` the user takes the more permissive; of all else that is
    named everything holds; a name that is not known, outside of parentheses, makes the whole unknown."""
    choices = [_all_of(choice, rows) for choice in re.split(r"\s+OR\s+", stated)]
    return min(choices, key=lambda terms: [STRICTER.index(getattr(terms, question)) for question in QUESTIONS])


def _all_of(stated: str, rows: Sequence[Row]) -> Terms:
    if whole := _named(stated, rows):
        return whole
    asides = re.findall(r"\(([^()]*)\)", stated)
    outside = re.sub(r"\([^()]*\)?", ",", re.sub(r"\s+WITH\s+\S+", "", stated)) if asides else stated
    outside = re.sub(r"\s+WITH\s+\S+", "", outside)
    found = [_named(part, rows) or UNKNOWN for part in _parts(outside)]
    for aside in asides:
        for part in _parts(aside):
            words = part.split()
            spans = (" ".join(words[i : i + n]) for n in range(len(words), 0, -1) for i in range(len(words) - n + 1))
            found += [terms for span in spans if (terms := _named(span, rows))][:1]
    return joined(found)


def _parts(text: str) -> list[str]:
    return [part.strip() for part in re.split(r"[,;/|&()]|\s+AND\s+|\s+and\s+", text) if part.strip()]


def _named(name: str, rows: Sequence[Row]) -> Terms | None:
    plain = normal(name)
    found = next((row.terms for row in rows if any(fnmatch.fnmatchcase(plain, p) for p in row.licences)), None)
    narrowed = re.search(r"\bnon-?commercial|research-only|no-derivatives", plain)
    return None if narrowed and found and found.commercial == "yes" else found


def _host(endpoint: str) -> str:
    """The host of HOST:PORT or of a URL."""
    return re.sub(r":\d+$", "", endpoint.lower().partition("://")[2].partition("/")[0] or endpoint.lower()).strip("[]")


def _host_fits(host: str, hosts: Iterable[str]) -> bool:
    return any(host == one or host.endswith(f".{one}") for one in hosts)


def _model_fits(model: str, patterns: Iterable[str]) -> bool:
    name = model.lower().rstrip("/")
    names = {name, name.rsplit("/", 1)[-1]}
    return any(fnmatch.fnmatchcase(one, pattern) for one in names for pattern in patterns)
