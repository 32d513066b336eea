"""`kdcli cache --stats STORE [data.path=…]` and `--verify STORE`: what a store holds, and how well."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

from kdcli.api import Data, Student, Teacher
from kdcli.config.build import build
from kdcli.errors import ConfigError
from kdcli.store.models import load_tokenizer
from kdcli.store.signals import Signals, damage
from kdcli.store.signals_stats import Error, Stats, coverage, error_of, stats_of
from kdcli.text.tokenize import encode


def verify(path: str) -> int:
    """Read every shard; returns exit code 0. Raises ConfigError that names the damaged ones."""
    store = Signals(path)
    if found := damage(store.path):
        raise ConfigError(*(f"{store.path}: the shard {one}; {MEND}" for one in found))
    print(f"{store.path}: {len(store.shards)} shards, all as they were written")
    return 0


def show(path: str, overrides: Sequence[str]) -> int:
    """Print a table, with the coverage of the data that overrides choose. Raises ConfigError for a damaged shard."""
    store = Signals(path)
    covered = _coverage(store, overrides) if overrides else None
    stats = stats_of(store)
    error = None if stats.damaged else _error(store)
    Console(highlight=False).print(_table(store, stats, covered, error))
    if stats.damaged:
        raise ConfigError(*(f"{store.path}: the shard {one}; {MEND}" for one in stats.damaged))
    return 0


MEND = "run the same `kdcli cache` again, which writes it anew"


def _error(store: Signals) -> Error | str | None:
    """How far the store is from its teacher; a text says why that cannot be known."""
    node: Any = store.manifest.get("teacher_config")
    try:
        transformers.logging.disable_progress_bar()
        teacher = build(node, Teacher)
        if teacher.fingerprint() != store.identity.teacher:
            return "not measured: the teacher at its place is another one now"
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        teacher.load(device)
        return error_of(store, teacher, device)
    except (ConfigError, NotImplementedError) as error:
        return f"not measured: {error}"


def _coverage(store: Signals, overrides: Sequence[str]) -> tuple[int, int, int, int]:
    from kdcli.command.arguments import parse
    from kdcli.command.compose import compose, hydra, plain

    arguments = parse("cache", ["teacher=none", *overrides])
    with hydra(arguments) as app:
        config: Mapping[str, Any] = plain(compose(app, "cache", arguments.overrides), "cache")
    student = build(config["student"], Student)
    tokenizer = student.prepared(student.load_tokenizer() or load_tokenizer(store.tokenizer_path))
    rows, _ = encode(
        build(config["data"], Data),
        tokenizer,
        columns={"rejected"} if config["cache"]["rejected"] else (),
        **{key: config["batch"][key] for key in ("max_length", "overflow")},
    )
    return coverage(store, (segment for part in rows.values() for segment in part.segments))


def _table(store: Signals, stats: Stats, covered: tuple[int, int, int, int] | None, error: Error | str | None) -> Table:
    table = Table(title=str(store.path), show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    known = store.identity
    codec = " ".join(f"{key} {value}" for key, value in known.codec.items() if key != "codec")
    table.add_row("codec", f"{known.codec['codec']}: {codec}, temperature {known.temperature:g}")
    table.add_row("teacher", f"{(store.manifest.get('teacher_config') or {}).get('path', '?')}, {known.dtype or '?'}")
    table.add_row("sequences", f"{stats.sequences:,}")
    table.add_row("targets", f"{stats.targets:,}")
    table.add_row("bytes per target", f"{stats.size / max(1, stats.targets):.1f} ({stats.size:,} bytes in all)")
    table.add_row("ids per target", f"{stats.entries:.1f}")
    if stats.dropped is not None:
        mean, largest = stats.dropped
        table.add_row("dropped mass", f"mean {mean:.2e}, largest {largest:.2e} (of {stats.looked_at:,} targets)")
    if isinstance(error, Error):
        what = "KL(store || teacher)" if store.codec.sampled else "KL(teacher || store)"
        numbers = f"mean {error.mean:.2e}, largest {error.largest:.2e} nats (of {error.targets:,} targets)"
        table.add_row(what, numbers)
    else:
        table.add_row("KL error", error or "not measured: no token ids are kept")
    if covered is not None:
        rows, all_rows, targets, all_targets = covered
        table.add_row("coverage", f"{rows:,} of {all_rows:,} rows, {targets:,} of {all_targets:,} targets")
    state = "; ".join(stats.damaged) if stats.damaged else f"all {stats.shards} shards are as they were written"
    table.add_row("checksums", state)
    return table
