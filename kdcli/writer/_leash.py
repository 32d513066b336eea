"""A program that ends with the one that started it, also when that one is killed: `python _leash.py SECONDS COMMAND…`.

Its standard input is a pipe that only the starter holds. When it closes, the command's whole process group is asked to
end, and killed SECONDS later. The standard library alone, since it runs for itself.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time


def main() -> int:
    patience, command = float(sys.argv[1]), sys.argv[2:]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the starter's, which closes the pipe when it ends
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    threading.Thread(target=_watch, args=(process, patience), daemon=True).start()
    status = process.wait()
    _signal(process, signal.SIGKILL)  # whatever it left behind
    return status if status >= 0 else 128 - status


def _watch(process: subprocess.Popen[bytes], patience: float) -> None:
    while os.read(0, 1):
        pass
    _signal(process, signal.SIGTERM)
    time.sleep(patience)
    _signal(process, signal.SIGKILL)


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


if __name__ == "__main__":
    sys.exit(main())
