"""torchrun: one process in this one, several on this machine or on many."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from kdcli.api import Launcher
from kdcli.errors import ConfigError
from kdcli.launch import _processes


class Torchrun(Launcher):
    """`processes` on this machine; on `nodes` machines, the same command is started on each with the same run.dir on
    a shared disk, and `rendezvous` (host:port of one of them) brings them together."""

    def __init__(self, *, processes: int = 1, nodes: int = 1, rendezvous: str | None = None) -> None:
        if processes < 1 or nodes < 1:
            raise ConfigError(f"launch: processes={processes} and nodes={nodes} must both be at least 1")
        if nodes > 1 and not rendezvous:
            raise ConfigError(f"launch.rendezvous: {nodes} nodes need one address to meet at, such as node1:29500")
        self.processes = processes
        self.nodes = nodes
        self.rendezvous = rendezvous

    def __call__(self, run_dir: Path, *, isolate: bool = False) -> int:
        if self.processes * self.nodes == 1:
            if not isolate:
                return importlib.import_module("kdcli.worker").main(run_dir)
            return _processes.run([sys.executable, "-m", "kdcli.worker", str(run_dir)], run_dir, 1)
        meet = ["--standalone"]
        if self.nodes > 1:
            meet = ["--rdzv-backend=c10d", f"--rdzv-endpoint={self.rendezvous}", f"--rdzv-id={run_dir.name}"]
        command = [sys.executable, "-m", "kdcli.launch._agent", str(run_dir)]
        command += [*meet, f"--nnodes={self.nodes}", f"--nproc-per-node={self.processes}"]
        command += ["-m", "kdcli.worker", str(run_dir)]
        return _processes.run(command, run_dir, self.processes)
