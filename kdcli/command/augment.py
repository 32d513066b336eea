"""`kdcli augment`: make training rows; `--dry-run`: what that would cost; `--stats`, `--purge`: stored answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kdcli.command import hydra_verb
from kdcli.command.arguments import parse
from kdcli.errors import ConfigError

LAUNCH = {"_target_": "kdcli.launch.torchrun.Torchrun", "processes": 1, "nodes": 1, "rendezvous": None}


def main(argv: Sequence[str]) -> int:
    """Do what the overrides or the flag say; returns the exit code."""
    arguments = parse("augment", argv)
    if not arguments.help and (arguments.stats or arguments.purge):
        from kdcli.command import answers  # here, because it imports rich

        if arguments.stats:
            return answers.stats(arguments.stats)
        return answers.purge(arguments.purge, arguments.older_than)
    if arguments.older_than is not None and not arguments.help:
        raise ConfigError("--older-than: belongs to --purge STORE, which deletes stored answers of that age")
    if not arguments.dry_run or arguments.help:
        return hydra_verb.main("augment", argv, adjust=in_one_process)
    from kdcli.command import plan

    return hydra_verb.main("augment", argv, adjust=in_one_process, instead=plan.show)


def in_one_process(config: dict[str, Any]) -> None:
    """A recipe's launcher is for its training; here one process asks, by many threads (writer.NAME.concurrency)."""
    if str((config.get("launch") or {}).get("_target_", "")).startswith("kdcli.launch."):
        config["launch"] = dict(LAUNCH)
