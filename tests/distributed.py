"""Ranks for tests: children forked from a process that has imported everything, so a rank starts in milliseconds."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import deepspeed
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  (3 s of imports, before the fork)
import torch

torch.set_num_threads(1)  # forked OpenMP threads would hang


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
    assert not torch.distributed.is_initialized(), "an earlier test left a process group behind; a fork cannot use it"
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(world_size)]
        store = Path(folder) / "store" if join else None
        children = [
            context.Process(
                target=_child,
                args=(rank, world_size, store, timeout, env or {}, sender, function, arguments),
                daemon=False,
            )
            for rank, (_, sender) in enumerate(pipes)
        ]
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
        return outcomes


def _outcome(child: Any, receiver: Connection, deadline: float) -> tuple[bool, Any]:
    try:
        if receiver.poll(max(0.0, deadline - time.monotonic())):
            return pickle.loads(receiver.recv_bytes())  # noqa: S301 - from our own child
    except EOFError:
        child.join(5)
        return False, f"died with exit code {child.exitcode}"
    child.kill()
    return False, "still running at the timeout; killed"


def _child(
    rank: int,
    world_size: int,
    store: Path | None,
    timeout: float,
    env: dict[str, str],
    sender: Connection,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)  # renews torch's pool after the fork; two threads doing so at once would crash
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), **env)
    try:
        if store is not None:
            torch.distributed.init_process_group(
                "gloo",
                init_method=f"file://{store}",
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=timeout),
            )
        sender.send_bytes(pickle.dumps((True, function(*arguments))))
    except BaseException:
        sender.send_bytes(pickle.dumps((False, traceback.format_exc())))
    finally:
        sender.close()
        os._exit(0)
