"""`kdcli augment --stats STORE` and `--purge STORE --older-than DAYS`: what is stored of writers' answers."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

from rich.console import Console
from rich.table import Table

from kdcli.errors import ConfigError
from kdcli.store import responses


def stats(path: str) -> int:
    """Print a table: counts, models, days and cost, never what was said. Returns the exit code."""
    facts = responses.stats(Path(path).expanduser())
    table = Table(title=path, show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("answers", f"{facts['answers']:,}")
    for model, count in facts["models"].items():
        table.add_row("", f"{count:,} of {model or 'unnamed'}")
    if facts["answers"]:
        table.add_row("written", f"{facts['oldest']} to {facts['newest']}")
    for kind, count in facts["remembered"].items():
        table.add_row("remembered", f"{count:,} of {kind}")
    table.add_row("spent", f"{facts['cost']:,.4g} by {facts['runs']:,} run folders")
    table.add_row("size", f"{facts['bytes'] / 2**20:,.2f} MiB")
    Console(highlight=False).print(table)
    return 0


def purge(path: str, older_than: str | None) -> int:
    """Delete what was written more than `older_than` days ago; returns the exit code. Raises ConfigError without it."""
    if older_than is None or not older_than.isdigit():
        raise ConfigError(
            "--purge: deletes answers that were paid for; say how old they are at least, in days: --older-than 90 "
            "(0: all that was not written today)"
        )
    day = (datetime.now(UTC) - timedelta(days=int(older_than))).strftime("%Y-%m-%d")
    count = responses.purge(Path(path).expanduser(), day)
    print(f"{path}: {count:,} stored values from before {day} are deleted; what asks for them again pays again")
    return 0
