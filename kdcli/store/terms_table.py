"""The table of licences and terms as a file: its rows, read strictly, the user's own before the packaged ones."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
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
class Row:
    """Terms, and what they hold for."""

    terms: Terms
    licences: Sequence[str]  # patterns of names, normalised
    hosts: Sequence[str]
    models: Sequence[str]


def table() -> tuple[Row, ...]:
    """All rows, of equal ids the first. Raises ConfigError naming file and row."""
    return _table(_stamp())


def files() -> Sequence[Path]:
    """Where the table lies, the user's own first."""
    return Path("configs/terms.yaml"), paths.configs() / "terms.yaml"


def fingerprint() -> str:
    """A hash of the table, for steps whose output depends on it."""
    rows = [repr((row.terms, row.licences, row.hosts, row.models)) for row in table()]
    return xxhash.xxh3_128_hexdigest("\n".join(rows).encode())


def normal(name: str) -> str:
    """A licence's name without case, fillers, and the difference of blank, `-` and `_`."""
    words = [word for word in re.split(r"[\s_-]+", name.lower().strip()) if word not in FILLERS]
    return "-".join(words)


def _stamp() -> tuple[tuple[str, int, int], ...]:
    """What tells one state of the files from another."""
    return tuple(
        (str(file.resolve()), status.st_mtime_ns, status.st_size)
        for file in files()
        if file.is_file() and (status := file.stat())
    )


@lru_cache(maxsize=4)
def _table(stamp: tuple[tuple[str, int, int], ...]) -> tuple[Row, ...]:
    rows: dict[str, Row] = {}
    for file, _, _ in stamp:
        for row in _read(Path(file)):
            rows.setdefault(row.terms.id, row)
    return tuple(rows.values())


def _read(file: Path) -> Iterator[Row]:
    try:
        content = yaml.safe_load(file.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{file}: cannot be read ({' '.join(str(error).split())[:200]})") from None
    if not isinstance(content, dict) or not isinstance(content.get("terms"), list):
        raise ConfigError(f"{file}: holds no list `terms`; copy a row of the packaged configs/terms.yaml")
    for number, row in enumerate(content["terms"], start=1):
        yield _row(row, f"{file}: row {number}")


def _row(row: Any, where: str) -> Row:
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
    return Row(
        Terms(**values),
        tuple(normal(str(name)) for name in (row["id"], *matches.get("licences", ()))),
        tuple(str(host).lower() for host in matches.get("hosts", ())),
        tuple(str(pattern).lower() for pattern in matches.get("models", ())),
    )
