"""One rank of a run: `python -m kdcli.worker RUN_DIR`. Reads config.yaml, builds, and does what its verb says."""

from kdcli.worker.process import main

__all__ = ["main"]
