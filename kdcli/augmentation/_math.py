"""Mathematical equality by math-verify, in processes that are ended where a comparison does not come to its end."""

from __future__ import annotations

import atexit
import json
import os
import selectors
import subprocess
import sys
import threading
from functools import cache
from pathlib import Path
from typing import Self

from kdcli.errors import KDError
from kdcli.store.adapters import require

SECONDS = 5.0  # of the processor, for one comparison
WALL = 120.0  # where a machine is so busy, or so stuck, that the processor's time does not pass


class MathVerify:
    """Any number of threads may ask; each has a process while it does.

    Not math-verify's own time limits: those are signals, which only a main thread may set, and which do not end a
    computation in C. Raises ConfigError without math-verify.
    """

    def __init__(self, *, seconds: float = SECONDS) -> None:
        _require()
        self.seconds = seconds
        self._idle: list[subprocess.Popen[bytes]] = []
        self._lock = threading.Lock()

    def answer(self, text: str) -> str | None:
        """The final answer that a text gives, as it is written there; None where there is none, or none in time."""
        found = self._ask({"text": text})
        return None if found == "undecided" else found

    def compare(self, gold: str, said: str) -> str:
        """`right`, `wrong`, `unread` (one of them is no mathematics) or `undecided` (it took too long)."""
        return self._ask({"gold": gold, "said": said}) or "undecided"

    def close(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for process in idle:
            _end(process)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _ask(self, request: dict[str, str]) -> str | None:
        with self._lock:
            process = self._idle.pop() if self._idle else None
        process = process or self._start()
        try:
            line = self._line(process, request)
        except BaseException:
            _end(process)
            raise
        if line is None:
            _end(process)
            return "undecided"
        with self._lock:
            self._idle.append(process)
        return json.loads(line)

    def _line(self, process: subprocess.Popen[bytes], request: dict[str, str]) -> bytes | None:
        """What a process answers, or None once it cannot any more."""
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            raise KDError(f"math-verify cannot be run: its process ended with {process.wait()}") from None
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            if not selector.select(WALL):
                return None
        return process.stdout.readline() or self._ended(process)

    def _ended(self, process: subprocess.Popen[bytes]) -> None:
        """A process that its limit ended is None; any other end is an error."""
        if process.wait() > 0:
            raise KDError(f"math-verify cannot be run: its process ended with {process.returncode}")

    def _start(self) -> subprocess.Popen[bytes]:
        script = str(Path(__file__).with_name("_math_worker.py"))
        return subprocess.Popen(
            [sys.executable, "-P", "-s", script, str(self.seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={"PYTHONHASHSEED": "0", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            start_new_session=True,  # an interrupt of ours is not its own
        )


def shared() -> MathVerify:
    """The one of this process: a second step need not wait for math-verify to be imported again. Raises ConfigError
    without math-verify."""
    _require()
    return _one()


@cache
def _one() -> MathVerify:
    found = MathVerify()
    atexit.register(found.close)
    return found


def _require() -> None:
    require("math_verify", "augment", "comparing mathematical answers")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()
