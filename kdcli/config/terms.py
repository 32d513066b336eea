"""What a run is for, against what writers' terms and sources' licences say: an aid for records, no legal advice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kdcli.config import schema
from kdcli.errors import ConfigError
from kdcli.store import provenance
from kdcli.store.terms import NO_ADVICE, QUESTIONS, USES, Terms, cautions, conflicts, terms_of

Found = tuple[str, str, Terms]  # kind, name, terms


def of_writers(config: Mapping[str, Any], writers: Mapping[str, Any]) -> list[str]:
    """Conflicts of the declared use with the writers' terms and the data's licences; or that no such use exists."""
    declared = declared_of(config)
    if problem := _of_use(declared):
        return problem
    return _caught(lambda: conflicts(declared.use, declared.acknowledged, [*_writers(writers), *of_data(config)]))


def of_rows(config: Mapping[str, Any]) -> list[str]:
    """Conflicts of the declared use with a distillation's teacher and with what its rows carry."""
    declared = declared_of(config)
    if problem := _of_use(declared):
        return problem
    if declared.use is None:
        return []
    return _caught(lambda: conflicts(declared.use, declared.acknowledged, [*_teacher(config), *of_data(config)]))


def undeclared(config: Mapping[str, Any], writers: Mapping[str, Any]) -> list[str]:
    """One warning where no use is declared and something is not allowed for every use; else what is conditional."""
    declared = declared_of(config)
    found = [*_writers(writers), *of_data(config)]
    if declared.use is not None:
        return _caught(lambda: cautions(declared.use, declared.acknowledged, found))
    return _of_undeclared(declared, found)


def of_rows_undeclared(config: Mapping[str, Any]) -> list[str]:
    """The same of a distillation without augmentation: told where rows say that a model wrote them."""
    declared, found = declared_of(config), list(of_data(config))
    if declared.use is not None:
        return _caught(lambda: cautions(declared.use, declared.acknowledged, [*_teacher(config), *found]))
    return _of_undeclared(declared, found) if any(kind == "teacher" for kind, _, _ in found) else []


def of_data(config: Mapping[str, Any]) -> Iterator[Found]:
    """What the rows of a config's JSONL data carry; nothing of data that cannot be read, which others tell."""
    from kdcli.api import Data
    from kdcli.config.build import build

    try:
        files = jsonl_files(build(config["data"], Data)) if config.get("data") else []
    except ConfigError:
        files = []
    return provenance.terms_in(provenance.joined(map(provenance.of_file, files)))


def jsonl_files(data: Any) -> list[Path]:
    """The JSONL files that a Data component reads, itself or through another. Raises ConfigError."""
    from kdcli.api import Data

    if hasattr(data, "files"):
        return list(data.files())
    held = [value for item in vars(data).values() for value in (item.values() if isinstance(item, Mapping) else [item])]
    return list(dict.fromkeys(file for one in held if isinstance(one, Data) for file in jsonl_files(one)))


def declared_of(config: Mapping[str, Any]) -> schema.Terms:
    """The section `terms`, with what it leaves out."""
    return schema.Terms(**(config.get("terms") or {}))


def _of_use(declared: schema.Terms) -> list[str]:
    if declared.use is None or declared.use in USES:
        return []
    return [f"terms.use: is {declared.use}; declare one of {', '.join(USES)}, as configs/terms.yaml explains them"]


def _of_undeclared(declared: schema.Terms, found: list[Found]) -> list[str]:
    named = dict.fromkeys(
        f"{kind} {name} ({terms.id})"
        for kind, name, terms in found
        if any(getattr(terms, question) != "yes" for question in QUESTIONS)
        and not all(part in declared.acknowledged for part in terms.id.split("+"))
    )
    if not named:
        return []
    return [
        f"terms.use is not declared, and not every use of these is known to be allowed: {'; '.join(named)}; "
        f"declare it: terms.use={'|'.join(USES)} refuses what conflicts with it ({NO_ADVICE})"
    ]


def _writers(writers: Mapping[str, Any]) -> Iterator[Found]:
    for name, writer in writers.items():
        holds = terms_of(writer.license, writer.endpoint, writer.model, writer.terms)
        yield "writer", f"{name}, {writer.model} at {writer.endpoint}", holds


def _teacher(config: Mapping[str, Any]) -> Iterator[Found]:
    """The model whose signal is learned from, by its name alone."""
    path = (config.get("teacher") or {}).get("path")
    if isinstance(path, str) and (found := terms_of(None, None, path)).id != "unknown":
        yield "teacher", path, found


def _caught(action: Any) -> list[str]:
    try:
        return action()
    except ConfigError as error:
        return [p if p.startswith("terms") else f"terms: {p}" for p in error.problems]
