"""`kdcli distill`: compose, train, evaluate, export the student."""

from __future__ import annotations

from collections.abc import Sequence

from kdcli.command import hydra_verb


def main(argv: Sequence[str]) -> int:
    """Run what the overrides say; returns the exit code."""
    return hydra_verb.main("distill", argv)
