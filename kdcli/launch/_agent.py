"""torchrun, with its account of what failed left in the run folder in place of a traceback."""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from kdcli.launch import _lifeline
from kdcli.store import failures

PATIENCE = 2  # seconds between failures; a rank that is killed later was killed by the agent, because of the first


def main(run_dir: Path, arguments: list[str]) -> int:
    """torchrun's command line; returns 0, or 1 after a failure."""
    _lifeline.follow()
    if os.environ.get("KDCLI_TRACEBACK") != "1":
        logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        run.main(arguments)
    except ChildFailedError as error:
        first = min(failure.timestamp for failure in error.failures.values())
        for rank, failure in error.failures.items():
            if failure.exitcode < 0:  # one that raised has left word itself
                reason = f"it was killed by {signal.Signals(-failure.exitcode).name}"
                ours = -failure.exitcode in (signal.SIGTERM, signal.SIGINT) or failure.timestamp > first + PATIENCE
                failures.write(run_dir, failures.Failure(rank=rank, exit_code=1, reason=reason, lost_peer=ours))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
