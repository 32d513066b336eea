"""What licences and providers' terms say about training on text: configs/terms.yaml, a table that users can edit.

It helps to keep records and to notice a conflict early. It is no legal advice: rows are short readings of long texts,
each dated and with the address of the text that holds. Rows of ./configs/terms.yaml come before the packaged ones.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import xxhash
import yaml

from kdcli.errors import ConfigError
from kdcli.store import paths

Says = Literal["yes", "conditional", "unknown", "no"]
STRICTER = ("yes", "conditional", "unknown", "no")
QUESTIONS = {
    "outputs_may_train": "training a model on it",
    "commercial": "commercial use",
    "competing_models": "models that compete with its provider",
}
USES = {  # a declared use -> what must be allowed for it
    "research": ("outputs_may_train",),
    "commercial": ("outputs_may_train", "commercial"),
    "competing": ("outputs_may_train", "commercial", "competing_models"),
}
NO_ADVICE = "the table of terms is a record-keeping aid and no legal advice"
FILLERS = {"the", "license", "licence", "licensed", "data", "text", "version", "under"}


@dataclass(frozen=True, kw_only=True)
class Terms:
    """One row of the table, or several joined: of each question the strictest answer, ids with `+` between."""

    id: str
    kind: str  # licence (of a model's weights or of data) | terms (of a provider) | unknown
    outputs_may_train: Says = "unknown"  # of a model: what it writes; of data: the data itself
    commercial: Says = "unknown"
    competing_models: Says = "unknown"
    share_alike: bool = False
    attribution: str = ""  # whom to name, and how; empty: nobody
    naming: str = ""  # a rule for the name of what is trained; empty: none
    source: str = ""  # where the text that holds is
    checked_on: str = ""
    verified: bool = False  # whether the text itself was read on that day, and not what others say of it
    note: str = ""

    def record(self) -> dict[str, Any]:
        """JSON for manifests and cards."""
        return asdict(self)


UNKNOWN = Terms(id="unknown", kind="unknown", note="no row of the table of terms fits")


@dataclass(frozen=True)
class _Row:
    terms: Terms
    licences: Sequence[str]  # patterns of names, normalised
    hosts: Sequence[str]
    models: Sequence[str]


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
    rows = _table(_stamp())
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


def fingerprint() -> str:
    """A hash of the table, for steps whose output depends on it."""
    rows = [repr((row.terms, row.licences, row.hosts, row.models)) for row in _table(_stamp())]
    return xxhash.xxh3_128_hexdigest("\n".join(rows).encode())


def files() -> Sequence[Path]:
    """Where the table lies, the user's own first."""
    return Path("configs/terms.yaml"), paths.configs() / "terms.yaml"


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


# ------------------------------------------------------------------------------------------------ the table


def _stamp() -> tuple[tuple[str, int, int], ...]:
    """What tells one state of the files from another."""
    return tuple(
        (str(file.resolve()), status.st_mtime_ns, status.st_size)
        for file in files()
        if file.is_file() and (status := file.stat())
    )


@lru_cache(maxsize=4)
def _table(stamp: tuple[tuple[str, int, int], ...]) -> tuple[_Row, ...]:
    rows: dict[str, _Row] = {}
    for file, _, _ in stamp:
        for row in _read(Path(file)):
            rows.setdefault(row.terms.id, row)
    return tuple(rows.values())


def _read(file: Path) -> Iterator[_Row]:
    try:
        content = yaml.safe_load(file.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{file}: cannot be read ({' '.join(str(error).split())[:200]})") from None
    if not isinstance(content, dict) or not isinstance(content.get("terms"), list):
        raise ConfigError(f"{file}: holds no list `terms`; copy a row of the packaged configs/terms.yaml")
    for number, row in enumerate(content["terms"], start=1):
        yield _row(row, f"{file}: row {number}")


def _row(row: Any, where: str) -> _Row:
    known = set(Terms.__dataclass_fields__) | {"matches"}
    if not isinstance(row, Mapping) or not row.get("id") or row.get("kind") not in ("licence", "terms"):
        raise ConfigError(f"{where}: a row needs an id, and kind licence or terms")
    where = f"{where} ({row['id']})"
    if unknown := set(row) - known:
        raise ConfigError(f"{where}: has no key {sorted(unknown)[0]}; the keys are {', '.join(sorted(known))}")
    # yes and no without quotes are YAML's own words for true and false.
    said = {q: {"True": "yes", "False": "no"}.get(str(row.get(q)), row.get(q, "unknown")) for q in QUESTIONS}
    for question, answer in said.items():
        if answer not in STRICTER:
            raise ConfigError(f"{where}.{question}: is {answer}; write one of {', '.join(STRICTER)}")
    if "+" in str(row["id"]):
        raise ConfigError(f"{where}: an id has no +, which joins ids")
    matches = row.get("matches") or {}
    if not isinstance(matches, Mapping) or (odd := set(matches) - {"licences", "hosts", "models"}):
        raise ConfigError(f"{where}.matches: holds lists of licences, hosts and models{f', no {odd}' if odd else ''}")
    values: dict[str, Any] = {k: v for k, v in {**row, **said}.items() if k != "matches" and v is not None}
    values = {k: v if isinstance(v, bool) else " ".join(str(v).split()) for k, v in values.items()}
    return _Row(
        Terms(**values),
        tuple(_normal(str(name)) for name in (row["id"], *matches.get("licences", ()))),
        tuple(str(host).lower() for host in matches.get("hosts", ())),
        tuple(str(pattern).lower() for pattern in matches.get("models", ())),
    )


def _by_id(given: str, rows: Sequence[_Row]) -> Terms:
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


# ---------------------------------------------------------------------------------------- what a row fits


def _of_text(stated: str, rows: Sequence[_Row]) -> Terms:
    """The terms of a licence as people state it. Of `A OR B` the user takes the more permissive; of all else that is
    named everything holds; a name that is not known, outside of parentheses, makes the whole unknown."""
    choices = [_all_of(choice, rows) for choice in re.split(r"\s+OR\s+", stated)]
    return min(choices, key=lambda terms: [STRICTER.index(getattr(terms, question)) for question in QUESTIONS])


def _all_of(stated: str, rows: Sequence[_Row]) -> Terms:
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


def _named(name: str, rows: Sequence[_Row]) -> Terms | None:
    plain = _normal(name)
    found = next((row.terms for row in rows if any(fnmatch.fnmatchcase(plain, p) for p in row.licences)), None)
    narrowed = re.search(r"\bnon-?commercial|research-only|no-derivatives", plain)
    return None if narrowed and found and found.commercial == "yes" else found


def _normal(name: str) -> str:
    words = [word for word in re.split(r"[\s_-]+", name.lower().strip()) if word not in FILLERS]
    return "-".join(words)


def _host(endpoint: str) -> str:
    """The host of HOST:PORT or of a URL."""
    return re.sub(r":\d+$", "", endpoint.lower().partition("://")[2].partition("/")[0] or endpoint.lower()).strip("[]")


def _host_fits(host: str, hosts: Iterable[str]) -> bool:
    return any(host == one or host.endswith(f".{one}") for one in hosts)


def _model_fits(model: str, patterns: Iterable[str]) -> bool:
    name = model.lower().rstrip("/")
    names = {name, name.rsplit("/", 1)[-1]}
    return any(fnmatch.fnmatchcase(one, pattern) for one in names for pattern in patterns)
