"""Fault points: `KDCLI_FAULT=point[:rank=R][:step=S]:action`, honoured only with `KDCLI_TESTING=1`.

Actions: `kill`, `term`, `int`, `stop` (signals to this process), `raise`, `sleep=SECONDS`, `enospc`, `nan`.
Several faults are separated by commas. Points are named where they are called.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from dataclasses import dataclass

from kdcli.errors import ConfigError

SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "int": signal.SIGINT, "stop": signal.SIGSTOP}


def fault(point: str, *, rank: int | None = None, step: int | None = None) -> bool:
    """Fail here if a test asks for it. True means: poison the number at hand with NaN.

    `rank` defaults to this process's. Raises RuntimeError (`raise`) or OSError (`enospc`).
    """
    if "KDCLI_FAULT" not in os.environ or os.environ.get("KDCLI_TESTING") != "1" or not os.environ["KDCLI_FAULT"]:
        return False
    here = int(os.environ.get("RANK", "0")) if rank is None else rank
    matching = [f for f in _parse(os.environ["KDCLI_FAULT"]) if f.matches(point, here, step)]
    return any(f.act() for f in matching)


@dataclass(frozen=True)
class _Fault:
    point: str
    action: str
    rank: int | None = None
    step: int | None = None

    def matches(self, point: str, rank: int, step: int | None) -> bool:
        return self.point == point and self.rank in (None, rank) and self.step in (None, step)

    def act(self) -> bool:
        name, _, argument = self.action.partition("=")
        if name in SIGNALS:
            os.kill(os.getpid(), SIGNALS[name])
        elif name == "sleep":
            time.sleep(float(argument))
        elif name == "enospc":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        elif name == "raise":
            raise RuntimeError(f"fault injected at {self.point}")
        return name == "nan"


def _parse(text: str) -> list[_Fault]:
    """`a:rank=1:kill,b:step=3:nan` -> faults. Raises ConfigError naming what cannot be read."""
    faults = []
    for item in text.split(","):
        point, *middle, action = item.split(":")
        where = {key: value for key, _, value in (part.partition("=") for part in middle)}
        known = action.partition("=")[0] in {*SIGNALS, "raise", "sleep", "enospc", "nan"}
        if not point or not known or not set(where) <= {"rank", "step"}:
            raise ConfigError(f"KDCLI_FAULT: cannot read {item!r}; write point[:rank=R][:step=S]:action")
        numbers = {key: int(value) for key, value in where.items()}
        faults.append(_Fault(point, action, numbers.get("rank"), numbers.get("step")))
    return faults
