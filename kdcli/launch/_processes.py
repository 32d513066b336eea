"""Run a launcher's command: pass signals on to the workers, wait, and say what ended them."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from kdcli.errors import ConfigError
from kdcli.launch import _lifeline
from kdcli.store import failures, status
from kdcli.store.lock import RunLock

SIGNALS = (signal.SIGINT, signal.SIGTERM)
OF_A_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK")


def run(command: list[str], run_dir: Path, processes: int, env: Mapping[str, str] | None = None) -> int:
    """Start `command`, which starts the workers; returns the run's exit code, as status.json has it."""
    failures.clear(run_dir)
    child = subprocess.Popen(command, env=_environment(processes) | dict(env or {}), start_new_session=True)
    try:
        with _passing_signals_to_workers(child) as passed:
            code = child.wait()
    finally:
        _end(child)
    return _explain(run_dir, code, passed[0] if passed else 0)


def _environment(processes: int) -> dict[str, str]:
    """This process's, without what an outer launcher left, and with the cores dealt to the workers."""
    env = {name: value for name, value in os.environ.items() if name not in OF_A_LAUNCHER}
    cores = len(os.sched_getaffinity(0))
    env.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))
    env["KDCLI_LAUNCHER"] = _lifeline.token()
    env["PYTHONUNBUFFERED"] = "1"
    return env


@contextmanager
def _passing_signals_to_workers(child: subprocess.Popen[bytes]) -> Iterator[list[int]]:
    """To the workers themselves: what stands between (torchrun, deepspeed) would kill them while they save.
    Gives the list of signals passed on."""
    passed: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        del frame
        passed.append(number)
        for pid in _workers(child.pid) or [child.pid]:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    if threading.current_thread() is not threading.main_thread():
        yield passed
        return
    before = {number: signal.signal(number, pass_on) for number in SIGNALS}
    try:
        yield passed
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(child: subprocess.Popen[bytes]) -> None:
    """Nothing of the run outlives this call, whatever raised."""
    left = _descendants(child.pid)
    if child.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    for pid in left:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _workers(root: int) -> list[int]:
    """Descendants that have a rank, without their own children."""
    ranked = [pid for pid in _descendants(root) if _has_rank(pid)]
    return [pid for pid in ranked if _parent(pid) not in ranked]


def _descendants(root: int) -> list[int]:
    parents = {int(path.name): _parent(int(path.name)) for path in Path("/proc").iterdir() if path.name.isdigit()}
    found, frontier = [], [root]
    while frontier:
        frontier = [pid for pid, parent in parents.items() if parent in frontier]
        found += frontier
    return found


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _has_rank(pid: int) -> bool:
    try:
        return b"\0RANK=" in b"\0" + Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False


def _explain(run_dir: Path, code: int, asked: int) -> int:
    """The exit code of the run; on a failure say which rank failed first, and why. `asked`: the signal it got."""
    state = status.read(run_dir)
    if code == 0:
        return int(state.get("exit_code") or 0)
    cause = failures.first(run_dir)
    if cause is None and state.get("state") == "interrupted":
        return _say(state["reason"], state["exit_code"])
    if asked and (cause is None or cause.lost_peer):  # it ended before it could save, or before there was anything to
        reason = f"interrupted before it could save; go on with: kdcli resume {shlex.quote(str(run_dir))}"
        _rewrite(run_dir, state, "interrupted", 128 + asked, reason)
        return _say(reason, 128 + asked)
    if cause is None:
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        cause = failures.Failure(rank=0, exit_code=1, reason=f"the worker {how}, without a word; see kdcli.log")
    reason = f"rank {cause.rank}: {cause.reason}" if cause.rank else cause.reason
    _rewrite(run_dir, state, "failed", cause.exit_code, reason)
    return _say(f"error: {reason}", cause.exit_code, cause.traceback)


def _rewrite(run_dir: Path, old: Mapping[str, Any], state: status.State, exit_code: int, reason: str) -> None:
    """Write what rank 0 could not, or did not know; unless the folder is another run's at this moment."""
    resumable = any((run_dir / "checkpoints").glob("step-*"))
    step, steps = old.get("step", 0), old.get("steps", 0)
    try:
        with RunLock(run_dir):
            status.write(
                run_dir, state, step=step, steps=steps, resumable=resumable, exit_code=exit_code, reason=reason
            )
    except (ConfigError, OSError):
        return


def _say(text: str, code: int, traceback: str = "") -> int:
    encoding = sys.stderr.encoding or "ascii"
    shown = f"{traceback}{text}" if os.environ.get("KDCLI_TRACEBACK") == "1" else text
    print(shown.encode(encoding, "replace").decode(encoding), file=sys.stderr, flush=True)
    return code
