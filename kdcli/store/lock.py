"""One run per folder: an exclusive lock that ends with the process that holds it."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
from datetime import UTC, datetime
from pathlib import Path

from kdcli.errors import ConfigError

log = logging.getLogger(__name__)


class RunLock:
    """`with RunLock(run_dir):` holds `run_dir/.lock`; raises ConfigError when another process has it.

    The kernel drops the lock with its process, also after kill -9, so a lock is never stale; what the
    file says of a dead holder is only used for a note.
    """

    def __init__(self, run_dir: Path) -> None:
        self.path = Path(run_dir) / ".lock"
        self._descriptor: int | None = None

    def __enter__(self) -> RunLock:
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        holder = _read(descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                log.warning("%s cannot be locked (%s): keep other runs out of this folder", self.path, error)
                self._descriptor = descriptor
                return self
            os.close(descriptor)
            raise ConfigError(
                f"{self.path.parent}: this run folder is in use by {_describe(holder)}; "
                "wait for it to end, stop it, or give another run.dir"
            ) from None
        if holder:
            log.warning("taking over %s from %s, which has ended", self.path.parent, _describe(holder))
        me = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "start": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(me).encode(), 0)
        self._descriptor = descriptor
        return self

    def __exit__(self, *_: object) -> None:
        if self._descriptor is not None:
            os.ftruncate(self._descriptor, 0)  # an empty file says: let go in good order
            os.close(self._descriptor)
            self._descriptor = None


def _read(descriptor: int) -> dict[str, object]:
    try:
        return json.loads(os.pread(descriptor, 4096, 0) or b"{}")
    except ValueError:
        return {}


def _describe(holder: dict[str, object]) -> str:
    if not holder:
        return "another process"
    return f"process {holder.get('pid')} on {holder.get('host')}, started {holder.get('start')}"
