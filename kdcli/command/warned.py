"""Warnings about a config that nothing forbids, each once on stderr."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any


def tell(config: Mapping[str, Any]) -> None:
    """Print them."""
    from kdcli.config import augmented  # here, because it imports torch

    for line in augmented.warnings_in(config) if config["verb"] in ("augment", "distill") else []:
        print(f"warning: {line}", file=sys.stderr, flush=True)
