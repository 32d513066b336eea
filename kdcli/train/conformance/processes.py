"""The check that needs more than one process: gradients summed over two ranks of torch.distributed."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import traceback
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed

from kdcli.train.conformance import models, steps
from kdcli.train.conformance.candidate import Candidate, Measure, NotApplicable
from kdcli.train.conformance.models import apart, pair, step

SECONDS = 60.0


def two_processes_are_one(candidate: Candidate) -> Measure:
    """the gradients of two processes, summed by torch.distributed, are those of one, though their shares differ"""
    if "fork" not in multiprocessing.get_all_start_methods():
        raise NotApplicable("this system cannot fork a process")
    reference = step(pair(candidate), [models.batch(candidate)])
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        ends = [context.Pipe(duplex=False) for _ in range(2)]
        ranks = [
            context.Process(target=_rank, args=(candidate, rank, Path(folder) / "store", end[1]))
            for rank, end in enumerate(ends)
        ]
        for process, (_, sender) in zip(ranks, ends, strict=True):
            process.start()
            sender.close()
        try:
            vectors = [_received(receiver) for receiver, _ in ends]
        finally:
            for process in ranks:
                process.kill()
                process.join()
    return Measure(max(apart(vector, reference) for vector in vectors), steps.SINGLE)


def _rank(candidate: Candidate, rank: int, store: Path, sender: Connection) -> None:
    """One rank's part of the step, then the sum over ranks, sent back as a vector or a traceback."""
    torch.set_num_threads(1)  # renews torch's pool of threads, which does not survive a fork
    try:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=SECONDS)
        )
        model = pair(candidate)
        micro_batches = steps.ranks(models.batch(candidate), 2)[rank]
        counted = [model.count(one) for one in micro_batches]
        counts = torch.tensor([sum(one[name] for one in counted) for name in counted[0]], dtype=torch.float64)
        torch.distributed.all_reduce(counts)
        vector = models.share(model, micro_batches, dict(zip(counted[0], counts.tolist(), strict=True)))
        torch.distributed.all_reduce(vector)
        sender.send_bytes(pickle.dumps(vector.tolist()))
    except BaseException:
        sender.send_bytes(pickle.dumps(traceback.format_exc()))
    finally:
        sender.close()
        os._exit(0)  # the parent's handlers and buffers are not ours to run


def _received(receiver: Connection) -> torch.Tensor:
    if not receiver.poll(SECONDS):
        raise TimeoutError(f"a rank has not answered for {SECONDS:.0f} s")
    answer = pickle.loads(receiver.recv_bytes())  # noqa: S301 - from our own child
    if isinstance(answer, str):
        raise RuntimeError(answer)
    return torch.tensor(answer)
