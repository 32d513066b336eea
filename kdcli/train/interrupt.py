"""SIGINT and SIGTERM: the first asks the run to save itself, the second ends the process at once."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType

from kdcli.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SHOW_CURSOR = b"\x1b[?25h\n"


class Interrupt:
    """`with Interrupt() as interrupt:` catches both signals; `interrupt.received` is the first one's number, or 0.

    Until `defer()`, when there is something to save, a signal raises Interrupted where it finds the process.
    A second signal cannot tear anything: files are renamed into place only when whole.
    """

    def __init__(self) -> None:
        self.received = 0
        self.deferred = False
        self._before: dict[signal.Signals, object] = {}

    def defer(self) -> None:
        """From now on only take note; the loop asks at the next boundary. Raises Interrupted if one came already."""
        self.deferred = True
        if self.received:
            raise Interrupted(self.received)

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.received:
            if os.isatty(1):
                os.write(1, SHOW_CURSOR)  # a progress line hides it
            os._exit(128 + number)
        self.received = number
        if not self.deferred:
            raise Interrupted(number)
