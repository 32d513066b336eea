"""Tokenization of a data set: parallel, cached on disk by content, every lost example counted by reason."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict
from operator import length_hint
from pathlib import Path
from typing import Any, Literal

import xxhash

from kdcli.api import Data, Task
from kdcli.errors import ConfigError, DataError
from kdcli.store import paths
from kdcli.store.tokens import Segments, SegmentWriter, TokenRows
from kdcli.text._cache import bundling_plan, locked, new_folder, packing_plan, read_report, write_report
from kdcli.text._workers import Outcome, Settings, outcomes, worker_of
from kdcli.text.counts import Counts, EncodeReport

log = logging.getLogger(__name__)

FORMAT = 3  # of the cached files and of what is in them; a change makes old caches unread
NAMED = 20  # lost rows that the report names per domain
LARGE = 200_000  # examples of a domain from which on several processes pay
TEXT = Task()
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
    columns: Collection[str] = (),
    teacher_tokenizer: Any = None,
    task: Task = TEXT,
) -> tuple[dict[str, TokenRows], EncodeReport]:
    """Domain -> rows of at most `max_length` tokens, memory-mapped, and a report.

    A document longer than `max_length` is split (parts overlap by one token, so that every token is predicted once)
    or truncated; any other row is truncated at its end, and dropped when no target is left. `workers`: processes
    (default: one per core for large data, else this one). `chat_template`: see `Template`. Several processes may call
    this at once: one works, the others wait.

    `columns` says what the losses compare. With "rejected" a preference pair is one row of two sequences, the better
    answer first; otherwise its worse answer is left out. With "group" the answers of a domain that have a score and
    one `group` are one row, the best first.

    `teacher_tokenizer` is another one than the student's: then rows carry what the teacher sees, in its own template
    and tokens, with the stretches of the answer that both cut alike. Without it they do where a row has a
    `teacher_prompt`.

    `task` is what the student makes of a row; other than `causal` it takes no template, cuts a prompt rather than its
    label or response, and for `classification` the other tokenizer reads the prompt for the same label.

    Raises ConfigError when a domain is left without a target, when rows of several sequences were to be packed, and
    whatever reading the data raises.
    """
    if max_length < 2:
        raise ConfigError(f"batch.max_length is {max_length}; a row needs at least 2 tokens")
    if packing and task.kind != "causal":
        raise ConfigError(f"batch.packing: rows of a {task.kind} student are not packed; set it false")
    bundled = sorted({"rejected", "group"} & set(columns))
    if packing and bundled:
        raise ConfigError(
            f"batch.packing: answers that are compared ({', '.join(bundled)}) are not packed; set it false"
        )
    settings = Settings(
        max_length=max_length,
        split=overflow == "split",
        chat_template=chat_template,
        pairs="rejected" in columns,
        groups="group" in columns,
        task=task,
    )
    folder = paths.cache() / "tokens" / _cache_key(data, tokenizer, settings, teacher_tokenizer)
    folder.parent.mkdir(mode=0o700, exist_ok=True)
    with locked(folder):
        report = read_report(folder)
        if report is None:
            with new_folder(folder) as beside:
                report = _write_all(beside, data, tokenizer, settings, workers, teacher_tokenizer)
                write_report(beside, report)
        rows = {}
        for number, name in enumerate(report.domains):
            segments = Segments(folder / f"{number}.arrow", name)
            plan = None
            if packing:
                plan = packing_plan(folder / f"{number}.plan", segments, max_length)
            elif bundled:
                plan = bundling_plan(folder / f"{number}.rows", segments)
            rows[name] = TokenRows(segments, plan, bundled=bool(bundled))
    _check(report, max_length)
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


def _cache_key(data: Data, tokenizer: Any, settings: Settings, teacher_tokenizer: Any) -> str:
    """A hash of everything that the tokens depend on."""
    import transformers

    source = [data.fingerprint(), data.max_bad_fraction]
    tokenizers = [None if one is None else tokenizer_fingerprint(one) for one in (tokenizer, teacher_tokenizer)]
    return _hash([FORMAT, transformers.__version__, source, tokenizers, asdict(settings)])


def _write_all(
    folder: Path, data: Data, tokenizer: Any, settings: Settings, workers: int | None, teacher_tokenizer: Any
) -> EncodeReport:
    """Write each domain's segments to NUMBER.arrow."""
    report, worker = EncodeReport(domains={}), worker_of(tokenizer, settings, teacher_tokenizer)
    for number, (name, examples) in enumerate(data.domains().items()):
        known = set(data.bad_rows())
        found = outcomes(_shown(name, examples), worker, _processes(workers, examples))
        counts = _write(folder / f"{number}.arrow", name, found, data.max_bad_fraction, settings)
        _count_bad(counts, {where: reason for where, reason in data.bad_rows().items() if where not in known})
        report.domains[name] = counts
    return report


def _write(file: Path, domain: str, found: Iterable[Outcome], max_bad_fraction: float, settings: Settings) -> Counts:
    """Write a domain's segments and count. Raises ConfigError or DataError for examples that the template refuses."""
    counts, dropped, refused = Counts(), Counter(), []
    members: Counter[str] = Counter()  # of each group
    with SegmentWriter(file) as writer:
        for outcome in found:
            counts.examples += 1
            counts.truncated += outcome.truncated
            for segment in outcome.segments:
                writer.add(segment)
                counts.rows += 1
                counts.tokens += len(segment)
                counts.supervised += int(segment.mask[1:].sum())
                counts.pairs += segment.rejected
                counts.teacher_tokens += len(segment if segment.teacher is None else segment.teacher.ids)
            if outcome.group is not None:
                members[outcome.group] += 1
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
    counts.content = writer.digest
    counts.dropped = dict(dropped.most_common())
    counts.alone = sum(size == 1 for size in members.values())
    counts.groups = len(members) - counts.alone
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
    total = report.total
    lost = total.dropped.get(Outcome.CUT, 0) + total.dropped.get(Outcome.CUT_PAIR, 0)
    if lost > LOUD * total.examples:
        message = "%d of %d examples lost every supervised token to batch.max_length=%d; raise it to keep them"
        log.warning(message, lost, total.examples, max_length)
    if total.alone:
        message = "%d scored answers are alone in their group, so a loss on groups has nothing to compare them with"
        log.warning(message, total.alone)


def _processes(asked: int | None, examples: Iterable[Any]) -> int:
    """The tokenizer itself uses all cores; processes share out the Python around it, and cost seconds to start."""
    return asked or (len(os.sched_getaffinity(0)) if length_hint(examples) >= LARGE else 1)


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
