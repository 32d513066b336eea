"""One process of a run, from its config to its exit code."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shlex
import sys
import traceback
from pathlib import Path

import torch
import yaml

from kdcli.errors import Interrupted, KDError
from kdcli.launch import _lifeline
from kdcli.store import atomic, failures, status
from kdcli.store import log as run_log
from kdcli.store.lock import RunLock
from kdcli.train.interrupt import Interrupt
from kdcli.worker import augment, cache, distill, evaluate, export
from kdcli.worker.parts import change_status, resumable

log = logging.getLogger(__name__)

VERBS = {
    "distill": distill.work,
    "augment": augment.work,
    "evaluate": evaluate.work,
    "export": export.work,
    "cache": cache.work,
}
LOST_PEER = re.compile(
    r"connection (closed|reset)|timed out|broken pipe|socket (closed|error)|peer|NCCL|gloo", re.IGNORECASE
)


def main(run_dir: Path) -> int:
    """Do what `run_dir/config.yaml` says; returns the exit code, and leaves the reason of a failure in status.json."""
    run_dir = Path(run_dir)
    rank = int(os.environ.get("RANK", "0"))
    launched = _lifeline.VARIABLE in os.environ
    _quiet()
    with contextlib.ExitStack() as stack:
        interrupt = stack.enter_context(Interrupt())
        owner = False
        try:
            if rank == 0:
                stack.enter_context(RunLock(run_dir))
                owner = True
            run_log.setup(run_dir, rank)
            stack.callback(run_log.close)
            config = yaml.safe_load((run_dir / "config.yaml").read_text("utf-8"))
            if owner:
                change_status(run_dir, "running", steps=config["run"].get("steps", 0))
            VERBS[config["verb"]](run_dir, config, interrupt)
        except BaseException as error:
            if isinstance(error, SystemExit | GeneratorExit):
                raise
            if interrupt.received and not interrupt.deferred:
                error = Interrupted(interrupt.received)  # whatever a library has made of it
            return _failed(run_dir, rank, error, owner=owner, launched=launched)
    return 0


def _failed(run_dir: Path, rank: int, error: BaseException, *, owner: bool, launched: bool) -> int:
    """Log, write status and word for the launcher; returns the exit code."""
    told = _in_words(run_dir, error)
    code, reason = told.exit_code, run_log.redact(str(told))
    trace = run_log.redact("".join(traceback.format_exception(error)))
    interrupted = isinstance(told, Interrupted)
    if owner or rank > 0:
        log.error("%s", reason if interrupted else f"failed: {reason}\n{trace}", extra={run_log.FILE_ONLY: True})
    if owner and status.read(run_dir).get("state") != "interrupted":
        change_status(run_dir, "interrupted" if interrupted else "failed", exit_code=code, reason=reason)
    if launched and not interrupted:
        lost_peer = isinstance(told, LostPeerError)
        word = failures.Failure(rank=rank, exit_code=code, reason=reason, lost_peer=lost_peer, traceback=trace)
        failures.write(run_dir, word)
    if not launched:
        shown = f"{trace}{reason}" if os.environ.get("KDCLI_TRACEBACK") == "1" else reason
        _print_error(shown if interrupted else f"error: {shown}")
    return code


class LostPeerError(KDError):
    """Another process of the run died or hung; its own failure says why."""


def _in_words(run_dir: Path, error: BaseException) -> KDError:
    """What happened, as the user should hear it."""
    if isinstance(error, KeyboardInterrupt | Interrupted) and not str(error):
        number = error.exit_code - 128 if isinstance(error, Interrupted) else 2
        kept = "the checkpoint is as it was" if resumable(run_dir) else "there was nothing to save yet"
        again = f"go on with: kdcli resume {shlex.quote(str(run_dir))}"
        return Interrupted(number, f"interrupted before training began, so {kept}; {again}")
    if isinstance(error, KDError):
        return error
    first_line = next(iter(str(error).splitlines()), "")
    if full := atomic.no_space(error, run_dir):
        return full
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in first_line:
        return KDError(
            f"out of memory ({first_line}); lower batch.micro_size or batch.max_length, set "
            "engine.activation_checkpointing=true, or spread the model with engine=zero3 over more processes"
        )
    if isinstance(error, RuntimeError | ConnectionError) and LOST_PEER.search(first_line) and _many():
        without_place = re.sub(r"^\[[^\]]*\]\s*", "", first_line)
        return LostPeerError(f"another process of this run died or did not answer ({without_place})")
    return KDError(f"{type(error).__name__}: {first_line}; the traceback is in {run_dir / 'kdcli.log'}")


def _print_error(text: str) -> None:
    encoding = sys.stderr.encoding or "ascii"
    print(text.encode(encoding, "replace").decode(encoding), file=sys.stderr, flush=True)


def _many() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _quiet() -> None:
    """Silence at their source what tells a user nothing."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # of kernels it would rather have, when peft imports it
    import transformers

    transformers.logging.disable_progress_bar()
