"""Ranks for tests: children of a server that has imported everything and has no threads, so each starts at once.

Forking the tests' own process would hand on whatever an earlier test left in it, locks of its threads included: a
rank then hangs now and then. Functions and arguments are therefore pickled; a rank sees the environment and the
current folder of its caller.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import dill
import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[1]
PRELOADED = ["pytest", "dill", "tests.toys", "tests.imported"]  # the seconds of a rank's start
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(PRELOADED)
PATH = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]))

torch.set_num_threads(1)


def run_ranks(
    world_size: int,
    function: Callable[..., Any],
    *arguments: Any,
    timeout: float = 240.0,
    env: dict[str, str] | None = None,
    join: bool = True,
) -> list[Any]:
    """`function(*arguments)` on every rank of a gloo group; returns the results in rank order.

    A rank's exception becomes an AssertionError with its traceback; a rank that died is reported with its
    signal; ranks still running after `timeout` seconds are killed. `join=False`: no process group is made.
    """
    results = collect_ranks(world_size, function, *arguments, timeout=timeout, env=env, join=join)
    problems = [f"rank {rank}: {what}" for rank, (ok, what) in enumerate(results) if not ok]
    assert not problems, "\n".join(problems)
    return [value for _, value in results]


def collect_ranks(
    world_size: int,
    function: Callable[..., Any],
    *arguments: Any,
    timeout: float = 240.0,
    env: dict[str, str] | None = None,
    join: bool = True,
) -> list[tuple[bool, Any]]:
    """Like `run_ranks`, but each rank's outcome is told: (True, result) or (False, traceback or exit code)."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        task = _Task(
            world_size,
            Path(folder),
            join,
            timeout,
            {**os.environ, **(env or {})},
            os.getcwd(),
            dill.dumps((function, arguments)),
        )
        pipes = [CONTEXT.Pipe(duplex=False) for _ in range(world_size)]
        children = [
            CONTEXT.Process(target=_child, args=(rank, task, sender), daemon=False)
            for rank, (_, sender) in enumerate(pipes)
        ]
        patch.setenv("PYTHONPATH", PATH)  # for the server, which starts with the first child
        for child, (_, sender) in zip(children, pipes, strict=True):
            child.start()
            sender.close()
        deadline = time.monotonic() + timeout
        outcomes: list[tuple[bool, Any]] = []
        for child, (receiver, _) in zip(children, pipes, strict=True):
            outcomes.append(_outcome(child, receiver, deadline))
        for child in children:
            child.join(max(0.0, deadline + 5 - time.monotonic()))
            if child.is_alive():
                child.kill()
                child.join()
        for stream in (1, 2):
            for rank in range(world_size):
                written = task.output(rank, stream)
                os.write(stream, written.read_bytes() if written.exists() else b"")
        return outcomes


@dataclass(frozen=True)
class _Task:
    """What every rank is told."""

    world_size: int
    folder: Path
    join: bool
    timeout: float
    env: dict[str, str]
    current: str
    work: bytes

    def output(self, rank: int, stream: int) -> Path:
        """What a rank writes to stdout (1) or stderr (2), for its caller to show."""
        return self.folder / f"{rank}.{stream}"


def _outcome(child: Any, receiver: Connection, deadline: float) -> tuple[bool, Any]:
    try:
        if receiver.poll(max(0.0, deadline - time.monotonic())):
            return pickle.loads(receiver.recv_bytes())  # noqa: S301 - from our own child
    except EOFError:
        child.join(5)
        return False, f"died with exit code {child.exitcode}"
    child.kill()
    return False, "still running at the timeout; killed"


def _child(rank: int, task: _Task, sender: Connection) -> None:
    for stream in (1, 2):
        with task.output(rank, stream).open("wb") as file:
            os.dup2(file.fileno(), stream)
    faulthandler.dump_traceback_later(max(1.0, task.timeout - 5), exit=False)  # where it hangs, if it does
    torch.set_num_threads(1)
    os.environ.clear()
    os.environ.update(task.env, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(task.world_size))
    os.chdir(task.current)
    try:
        if task.join:
            torch.distributed.init_process_group(
                "gloo",
                init_method=f"file://{task.folder / 'store'}",
                rank=rank,
                world_size=task.world_size,
                timeout=timedelta(seconds=task.timeout),
            )
        function, arguments = dill.loads(task.work)  # noqa: S301 - from our own parent
        sender.send_bytes(pickle.dumps((True, function(*arguments))))
    except BaseException:
        sender.send_bytes(pickle.dumps((False, traceback.format_exc())))
    finally:
        sender.close()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
