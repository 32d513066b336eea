"""A worker dies with the process that launched it, also when that one is killed with -9."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import threading
import time
from pathlib import Path

VARIABLE = "KDCLI_LAUNCHER"  # host:pid:start of the launching process
PERIOD = 1.0  # seconds between two looks
PR_SET_PDEATHSIG = 1


def token() -> str:
    """What a launcher puts into its workers' environment."""
    return f"{socket.gethostname()}:{os.getpid()}:{_start(os.getpid())}"


def follow() -> None:
    """End this process with its parent, and with the launcher further up; without a launcher, do nothing."""
    host, _, rest = os.environ.get(VARIABLE, "").partition(":")
    if host != socket.gethostname():
        return  # started by hand, or on another machine, where the remote shell ends it
    pid, start = rest.split(":")
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_watch, args=(int(pid), start), name="lifeline", daemon=True).start()


def _watch(pid: int, start: str) -> None:
    while _start(pid) == start:
        time.sleep(PERIOD)
    os.kill(os.getpid(), signal.SIGKILL)


def _start(pid: int) -> str:
    """When a process started, in clock ticks since boot, so that a reused pid is not taken for it; "" if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
