"""The deepspeed launcher: from one machine, it starts the processes on all machines of a hostfile."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

from kdcli.api import Launcher
from kdcli.errors import ConfigError
from kdcli.launch import _processes


class DeepSpeedLauncher(Launcher):
    """`processes` per machine. `hostfile` has lines such as `node1 slots=8`; its machines are reached by ssh (pdsh)
    and share the disk with the run folder. `include` picks some, such as `node1@node2:0,1`."""

    def __init__(
        self,
        *,
        processes: int = 1,
        nodes: int = 1,
        hostfile: str | None = None,
        include: str | None = None,
        master_port: int | None = None,
    ) -> None:
        if processes < 1 or nodes < 1:
            raise ConfigError(f"launch: processes={processes} and nodes={nodes} must both be at least 1")
        if nodes > 1 and hostfile is None:
            raise ConfigError(f"launch.hostfile: {nodes} nodes need a file that names them, a line `HOST slots=N` each")
        if hostfile is not None and not Path(hostfile).is_file():
            raise ConfigError(f"launch.hostfile: {hostfile} is no file")
        self.processes = processes
        self.nodes = nodes
        self.hostfile = hostfile
        self.include = include
        self.master_port = master_port

    def __call__(self, run_dir: Path, *, isolate: bool = False) -> int:
        del isolate  # always in processes of its own
        command = [sys.executable, "-m", "deepspeed.launcher.runner", "--quiet", "--no_local_rank"]
        command += [f"--master_port={self.master_port or _free_port()}", f"--num_gpus={self.processes}"]
        if self.hostfile is not None:
            command += [f"--hostfile={Path(self.hostfile).resolve()}", f"--num_nodes={self.nodes}"]
        if self.include is not None:
            command += [f"--include={self.include}"]
        return _processes.run([*command, "--module", "kdcli.worker", str(run_dir)], run_dir, self.processes)


def _free_port() -> int:
    """A port that nobody listens on at this moment."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        return listener.getsockname()[1]
