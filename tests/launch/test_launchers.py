"""How launchers call the worker; what needs real processes is in tests/test_faults_processes.py."""

from __future__ import annotations

import os
import sys

import pytest

import kdcli.worker
from kdcli.errors import ConfigError
from kdcli.launch import _lifeline, _processes
from kdcli.launch.deepspeed import DeepSpeedLauncher
from kdcli.launch.torchrun import Torchrun
from kdcli.store import failures, status
from kdcli.store.failures import Failure


def test_one_process_runs_in_this_one(tmp_path, monkeypatch):
    monkeypatch.setattr(kdcli.worker, "main", lambda run_dir: (os.getpid(), run_dir))
    assert Torchrun()(tmp_path) == (os.getpid(), tmp_path)


def commands(monkeypatch):
    seen = []
    monkeypatch.setattr(_processes, "run", lambda command, *rest: seen.append((command, *rest)) or 0)
    return seen


def test_an_isolated_process_and_several_are_started_by_name(tmp_path, monkeypatch):
    seen = commands(monkeypatch)
    Torchrun()(tmp_path, isolate=True)
    Torchrun(processes=3)(tmp_path)
    Torchrun(processes=8, nodes=2, rendezvous="node1:29500")(tmp_path)
    one, three, many = (command for command, *_ in seen)
    assert one == [sys.executable, "-m", "kdcli.worker", str(tmp_path)]
    assert three[-3:] == many[-3:] == ["-m", "kdcli.worker", str(tmp_path)]
    assert {"--standalone", "--nproc-per-node=3"} <= set(three)
    assert {"--nnodes=2", "--rdzv-endpoint=node1:29500", "--nproc-per-node=8"} <= set(many)


def test_the_deepspeed_launcher_has_a_port_of_its_own(tmp_path, monkeypatch):
    seen = commands(monkeypatch)
    (tmp_path / "hosts").write_text("node1 slots=2\n")
    DeepSpeedLauncher(processes=2)(tmp_path)
    DeepSpeedLauncher(processes=2)(tmp_path)
    DeepSpeedLauncher(processes=2, nodes=1, hostfile=str(tmp_path / "hosts"))(tmp_path)
    ports = {word for command, *_ in seen for word in command if word.startswith("--master_port=")}
    assert len(ports) == 3
    assert f"--hostfile={tmp_path / 'hosts'}" in seen[2][0]


@pytest.mark.parametrize(
    ("launcher", "settings", "word"),
    [
        (Torchrun, {"processes": 0}, "processes=0"),
        (Torchrun, {"nodes": 2}, "launch.rendezvous"),
        (DeepSpeedLauncher, {"nodes": 2}, "launch.hostfile"),
        (DeepSpeedLauncher, {"hostfile": "/nowhere"}, "/nowhere"),
    ],
)
def test_bad_settings_are_refused(launcher, settings, word):
    with pytest.raises(ConfigError, match=word):
        launcher(**settings)


def test_cores_are_dealt_to_processes_unless_set(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cores = len(os.sched_getaffinity(0))
    assert _processes._environment(1)["OMP_NUM_THREADS"] == str(cores)
    assert _processes._environment(10**6)["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert _processes._environment(1)["OMP_NUM_THREADS"] == "7"


def test_the_ranks_of_an_outer_launcher_are_not_inherited(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("MASTER_PORT", "1")
    assert not {"RANK", "MASTER_PORT"} & set(_processes._environment(1))


def test_the_cause_is_the_first_that_did_not_lose_a_peer(tmp_path):
    failures.write(tmp_path, Failure(rank=0, exit_code=1, reason="lost", lost_peer=True))
    failures.write(tmp_path, Failure(rank=2, exit_code=3, reason="cause"))
    failures.write(tmp_path, Failure(rank=1, exit_code=1, reason="later"))
    cause = failures.first(tmp_path)
    assert cause is not None
    assert cause.reason == "cause"
    failures.clear(tmp_path)
    assert failures.first(tmp_path) is None


def run_script(tmp_path, script: str) -> int:
    return _processes.run([sys.executable, "-c", script], tmp_path, 1)


def test_the_exit_code_and_reason_are_the_failing_ranks(tmp_path, capfd):
    word = "from pathlib import Path; from kdcli.store.failures import *"
    script = (
        f"{word}; write(Path({str(tmp_path)!r}), Failure(rank=1, exit_code=3, reason='bad data')); raise SystemExit(1)"
    )
    assert run_script(tmp_path, script) == 3
    assert capfd.readouterr().err == "error: rank 1: bad data\n"
    assert status.read(tmp_path)["exit_code"] == 3
    assert status.read(tmp_path)["reason"] == "rank 1: bad data"


def test_a_worker_killed_without_a_word_is_said(tmp_path, capfd):
    assert run_script(tmp_path, "import os; os.kill(os.getpid(), 9)") == 1
    assert "killed by SIGKILL" in capfd.readouterr().err
    assert status.read(tmp_path)["state"] == "failed"


def test_a_launcher_is_known_by_pid_and_start():
    _host, pid, start = _lifeline.token().split(":")
    assert int(pid) == os.getpid()
    assert _lifeline._start(os.getpid()) == start
    assert _lifeline._start(2**22 + 1) == ""
