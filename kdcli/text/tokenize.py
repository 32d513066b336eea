"""Tokenization of a data set: parallel, cached on disk by content, every lost example counted by reason."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from operator import length_hint
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xxhash
from filelock import FileLock, Timeout

from kdcli.api import Data
from kdcli.errors import ConfigError, DataError, KDError
from kdcli.store import atomic, paths
from kdcli.store.tokens import Segments, SegmentWriter, TokenRows
from kdcli.text._workers import Outcome, Settings, outcomes
from kdcli.text.counts import Counts, EncodeReport
from kdcli.text.pack import pack

log = logging.getLogger(__name__)

FORMAT = 1  # of the cached files and of what is in them; a change makes old caches unread
NAMED = 20  # lost rows that the report names per domain
LOUD = 0.05  # share of examples lost to truncation from which on a warning is due


def encode(
    data: Data,
    tokenizer: Any,
    *,
    max_length: int,
    packing: bool = False,
    overflow: Literal["split", "truncate"] = "split",
    workers: int | None = None,
    chat_template: str | None = None,
) -> tuple[dict[str, TokenRows], EncodeReport]:
    """Domain -> rows of at most `max_length` tokens, memory-mapped, and a report.

    A document longer than `max_length` is split (parts overlap by one token, so that every token is predicted once)
    or truncated; any other row is truncated at its end, and dropped when no target is left. `workers`: processes for
    large data (default: one per core). Several processes may call this at once: one works, the others wait.

    Raises ConfigError when a domain is left without a target, and whatever reading the data raises.
    """
    if max_length < 2:
        raise ConfigError(f"batch.max_length is {max_length}; a row needs at least 2 tokens")
    settings = Settings(max_length=max_length, split=overflow == "split", chat_template=chat_template)
    key = cache_key(data, tokenizer, settings)
    folder = paths.cache() / "tokens" / key
    folder.parent.mkdir(mode=0o700, exist_ok=True)
    with _locked(folder.with_suffix(".lock")):
        report = _read_report(folder)
        if report is None:
            report = _build(folder, data, tokenizer, settings, workers or len(os.sched_getaffinity(0)))
        plans = _plans(folder, report, max_length) if packing else {}
    _check(report, max_length)
    rows = {
        name: TokenRows(Segments(folder / f"{number}.arrow", name), plans.get(name))
        for number, name in enumerate(report.domains)
    }
    return rows, report


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A hash of what a tokenizer does: vocabulary, merges, normalization, special tokens and chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content = json.loads(backend.to_str())
        content.pop("truncation", None)  # changed by the way a tokenizer was called last
        content.pop("padding", None)
    else:
        content = [type(tokenizer).__name__, tokenizer.get_vocab()]
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return _hash([content, special, tokenizer.chat_template])


def cache_key(data: Data, tokenizer: Any, settings: Settings) -> str:
    """A hash of everything that the tokens depend on."""
    import transformers

    source = [data.fingerprint(), data.max_bad_fraction]
    return _hash([FORMAT, transformers.__version__, source, tokenizer_fingerprint(tokenizer), asdict(settings)])


def _build(folder: Path, data: Data, tokenizer: Any, settings: Settings, workers: int) -> EncodeReport:
    """Write the folder beside its place and rename it when it is whole. The caller holds its lock."""
    beside = folder.with_name(f".tmp-{folder.name}")
    shutil.rmtree(beside, ignore_errors=True)  # of a process that was killed
    beside.mkdir(mode=0o700)
    try:
        report = EncodeReport(domains={})
        for number, (name, examples) in enumerate(data.domains().items()):
            file, known = beside / f"{number}.arrow", set(data.bad_rows())
            found = outcomes(_shown(name, examples), tokenizer, settings, workers=_worth(workers, examples))
            report.domains[name] = _write(file, name, found, data.max_bad_fraction)
            bad = {where: reason for where, reason in data.bad_rows().items() if where not in known}
            _count_bad(report.domains[name], bad)
            atomic.fsync_file(file)
        sizes = {file.name: file.stat().st_size for file in beside.iterdir()}
        atomic.write_json(beside / "report.json", {"sizes": sizes, "domains": asdict(report)["domains"]})
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(beside, folder)
        atomic.fsync_folder(folder.parent)
        return report
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise KDError(f"no space left on the disk of {folder.parent}; make room, or set KDCLI_CACHE") from error
        raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _write(file: Path, domain: str, found: Iterable[Outcome], max_bad_fraction: float) -> Counts:
    """Write a domain's segments and count. Raises ConfigError or DataError for examples that the template refuses."""
    counts, dropped, refused = Counts(), Counter(), []
    with SegmentWriter(file) as writer:
        for outcome in found:
            counts.examples += 1
            counts.truncated += outcome.truncated
            for segment in outcome.segments:
                writer.add(segment)
                counts.rows += 1
                counts.tokens += len(segment)
                counts.supervised += int(segment.mask[1:].sum())
            if outcome.reason:
                dropped[outcome.reason] += 1
                if len(counts.named) < NAMED:
                    counts.named[outcome.where] = outcome.reason
            if outcome.problem:
                refused.append(f"{outcome.where}: {outcome.problem}")
                if not max_bad_fraction:
                    raise ConfigError(refused[0], "Mend the row, or drop such rows with data.max_bad_fraction=0.01")
    if len(refused) > max_bad_fraction * counts.examples:
        share = f"{len(refused)} of {counts.examples} examples cannot be used"
        raise DataError(f"domain {domain}: {share}, more than data.max_bad_fraction allows; the first: {refused[0]}")
    counts.dropped = dict(dropped.most_common())
    return counts


def _count_bad(counts: Counts, bad: Mapping[str, str]) -> None:
    """Add the rows that never became examples."""
    counts.examples += len(bad)
    counts.dropped = dict((Counter(counts.dropped) + Counter(bad.values())).most_common())
    counts.named |= dict(list(bad.items())[:NAMED])


def _check(report: EncodeReport, max_length: int) -> None:
    """Raises ConfigError when a domain has no target, warns when truncation costs more than `LOUD` of the examples."""
    for name, counts in report.domains.items():
        if counts.supervised == 0:
            reason = next(iter(counts.dropped), "they have no text")
            raise ConfigError(
                f"domain {name}: 0 of {counts.examples} examples have a supervised token within "
                f"batch.max_length={max_length} (most often: {reason}); raise batch.max_length or take the domain out"
            )
    lost = sum(counts.dropped.get(Outcome.CUT, 0) for counts in report.domains.values())
    if lost > LOUD * report.total.examples:
        log.warning(
            "%d of %d examples lost every supervised token to batch.max_length=%d; raise it to keep them",
            lost,
            report.total.examples,
            max_length,
        )


def _plans(folder: Path, report: EncodeReport, capacity: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Packing plans per domain, made once and kept beside the tokens."""
    plans = {}
    for number, name in enumerate(report.domains):
        file = folder / f"{number}.plan.npz"
        if not file.exists():
            order, starts = pack(Segments(folder / f"{number}.arrow", name).lengths(), capacity)
            buffer = io.BytesIO()
            np.savez(buffer, order=order, starts=starts)
            atomic.write_bytes(file, buffer.getvalue())
        with np.load(file, allow_pickle=False) as arrays:
            plans[name] = (arrays["order"], arrays["starts"])
    return plans


def _read_report(folder: Path) -> EncodeReport | None:
    """The report of a whole folder, or None."""
    try:
        content = json.loads((folder / "report.json").read_bytes())
        whole = all((folder / name).stat().st_size == size for name, size in content["sizes"].items())
        domains = {name: Counts(**counts) for name, counts in content["domains"].items()}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return EncodeReport(domains=domains, cached=True) if whole else None


def _locked(path: Path) -> FileLock:
    """A lock that is told about when another process holds it."""
    lock = FileLock(str(path), mode=0o600)
    try:
        lock.acquire(blocking=False)
        lock.release()
    except Timeout:
        log.info("waiting for another process that tokenizes the same data (%s)", path)
    return lock


def _worth(workers: int, examples: Iterable[Any]) -> int:
    """Processes cost seconds to start; a tokenizer alone does thousands of examples a second."""
    return workers if length_hint(examples) >= 20_000 else 1


def _shown(name: str, examples: Iterable[Any]) -> Iterator[Any]:
    """The examples, with a progress bar where someone can see it."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    hidden = not console.is_terminal or os.environ.get("RANK", "0") != "0"
    total = length_hint(examples) or None
    yield from track(examples, f"tokenizing {name}", total=total, console=console, transient=True, disable=hidden)


def _hash(content: Any) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True, default=str).encode())
