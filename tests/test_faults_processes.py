"""FAULTS.md A.3, the rows that need real processes: launchers, torchrun's agent, signals between them, terminals."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests import runs

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = """
import sys
from pathlib import Path
from kdcli.launch.{module} import {name}
sys.exit({name}({arguments})(Path(sys.argv[1]), isolate=True))
"""

pytestmark = pytest.mark.slow


@contextmanager
def launched(
    run_dir: Path, arguments: str = "processes=2", fault: str = "", env=None, launcher: Any = None
) -> Iterator[Any]:
    """A launcher in a process of its own, killed with all its children at the end."""
    module, name = launcher or ("torchrun", "Torchrun")
    code = LAUNCH.format(module=module, name=name, arguments=arguments)
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(run_dir)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(run_dir, fault) | (env or {}),
        text=True,
        start_new_session=True,
    )
    try:
        yield child
    finally:
        child.kill()
        child.communicate()
        for pid in of_run(run_dir):
            os.kill(pid, signal.SIGKILL)


def environment(run_dir: Path, fault: str = "") -> dict[str, str]:
    cache = str(run_dir.parent / "cache")
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "KDCLI_TESTING": "1",
        "KDCLI_FAULT": fault,
        "KDCLI_CACHE": cache,
    }


def finish(child: Any, within: float = 60.0) -> tuple[int, str, float]:
    """Exit code, stderr, seconds."""
    began = time.monotonic()
    _, err = child.communicate(timeout=within)
    return child.returncode, err, time.monotonic() - began


def of_run(run_dir: Path) -> list[int]:
    """Processes, zombies aside, that name the run folder, launchers and workers alike."""
    found = []
    for path in Path("/proc").iterdir():
        if path.name.isdigit() and int(path.name) != os.getpid():
            try:
                words, state = (
                    (path / "cmdline").read_bytes(),
                    (path / "stat").read_text().rpartition(")")[2].split()[0],
                )
            except OSError:
                continue
            if str(run_dir).encode() in words.split(b"\0") and state != "Z":
                found.append(int(path.name))
    return found


def wait_for(condition, within: float = 60.0) -> None:
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)


def nobody(run_dir: Path) -> bool:
    return not of_run(run_dir)


def long_run(folder: Path, **changes: Any) -> Path:
    return runs.write_run(folder, run__steps=10_000, run__save_every=0, **changes)


def test_a_rank_killed_ends_the_run_soon_and_is_named(tmp_path):
    run_dir = runs.write_run(tmp_path)
    with launched(run_dir, fault="step.optim:rank=1:step=3:kill") as child:
        code, err, seconds = finish(child)
        assert code == 1
        assert seconds < 60
        assert "error: rank 1: it was killed by SIGKILL" in err
        assert "Traceback" not in err
        wait_for(lambda: nobody(run_dir), within=5)
    state = runs.state(run_dir)
    assert (state["state"], state["exit_code"], state["resumable"]) == ("failed", 1, True)
    assert "rank 1" in state["reason"]
    assert runs.checkpoints(run_dir) == ["step-000002"], "the survivor started no collective save"


def test_a_rank_that_raises_is_named_with_its_traceback_in_the_log(tmp_path):
    run_dir = runs.write_run(tmp_path)
    with launched(run_dir, fault="step.backward:rank=1:step=1:raise") as child:
        code, err, _ = finish(child)
    assert code == 1
    assert "error: rank 1: RuntimeError: fault injected at step.backward" in err
    log = (run_dir / "kdcli.log").read_text()
    assert re.search(r"\[rank 1\] ERROR .*\n.*\nTraceback (.|\n)*fault injected", log) or (
        "[rank 1] ERROR" in log and "Traceback" in log
    )


def test_wrong_input_keeps_its_exit_code_through_torchrun(tmp_path):
    run_dir = runs.write_run(tmp_path, run__resume=str(tmp_path / "nowhere"))
    with launched(run_dir) as child:
        code, err, _ = finish(child)
    assert code == 2
    assert err.count("error:") == 1
    assert runs.state(run_dir)["exit_code"] == 2


def test_a_rank_that_hangs_ends_the_run(tmp_path):
    """In the middle of a step, so that the others wait in one of DeepSpeed's own groups. Both stages at once, because
    torchrun gives a rank that does not answer half a minute."""
    stages = [runs.write_run(tmp_path / f"{n}", engine__collective_timeout=0.1, engine__stage=n) for n in (0, 3)]
    fault = "step.forward:rank=1:step=3:stop"
    with launched(stages[0], fault=fault) as first, launched(stages[1], fault=fault) as second:
        for run_dir, child in zip(stages, (first, second), strict=True):
            code, err, _ = finish(child, within=120)
            assert code == 1
            assert time.time() - (run_dir / "metrics.jsonl").stat().st_mtime < 60, "since its last step"
            assert "died or did not answer" in err
            wait_for(lambda run_dir=run_dir: nobody(run_dir), within=5)
            assert runs.checkpoints(run_dir) == ["step-000002"]


def test_workers_die_with_a_launcher_that_is_killed(tmp_path):
    run_dir = long_run(tmp_path)
    with launched(run_dir) as child:
        wait_for(lambda: len(runs.lines(run_dir)) > 2)
        with launched(run_dir, "processes=1") as second:
            code, err, _ = finish(second)
            assert code == 2
            assert "in use by process" in err
        assert runs.state(run_dir)["state"] == "running", "the refused one left the status alone"
        os.kill(child.pid, signal.SIGKILL)
        wait_for(lambda: nobody(run_dir), within=5)


def test_a_signal_to_the_launcher_saves_on_every_rank(tmp_path):
    run_dir = long_run(tmp_path)
    with launched(run_dir) as child:
        wait_for(lambda: len(runs.lines(run_dir)) > 2)
        child.send_signal(signal.SIGTERM)
        code, err, _ = finish(child)
        assert code == 143
        assert err.endswith(f"go on with: kdcli resume {run_dir}\n")
        wait_for(lambda: nobody(run_dir), within=5)
    state = runs.state(run_dir)
    assert (state["state"], state["resumable"]) == ("interrupted", True)
    assert runs.checkpoints(run_dir) == [f"step-{state['step']:06d}"]
    commit = run_dir / "checkpoints" / runs.checkpoints(run_dir)[0] / "COMMIT.json"
    assert '"world_size": 2' in commit.read_text()


def test_a_signal_before_training_is_an_interruption_too(tmp_path):
    run_dir = long_run(tmp_path)
    with launched(run_dir, fault="data.prepare:sleep=60") as child:
        wait_for(lambda: runs.state(run_dir).get("state") == "running")
        time.sleep(1)
        child.send_signal(signal.SIGTERM)
        code, err, seconds = finish(child)
    assert code == 143
    assert seconds < 30
    assert "kdcli resume" in err
    assert runs.state(run_dir)["state"] == "interrupted"


def test_the_deepspeed_launcher_runs_and_passes_signals_on(tmp_path):
    run_dir = long_run(tmp_path)
    with launched(run_dir, launcher=("deepspeed", "DeepSpeedLauncher")) as child:
        wait_for(lambda: len(runs.lines(run_dir)) > 2)
        child.send_signal(signal.SIGINT)
        code, _, _ = finish(child)
        assert code == 130
        wait_for(lambda: nobody(run_dir), within=5)
    assert runs.state(run_dir)["state"] == "interrupted"


def test_no_compiler_odd_locale_no_terminal(tmp_path):
    """Everything that a bare machine lacks at once; what is printed is plain ASCII lines, times are UTC."""
    run_dir = runs.write_run(
        tmp_path, report={"console": {"_target_": "kdcli.report.console.Console"}}, evaluation=runs.heldout(tmp_path)
    )
    odd = {
        "PATH": "/nonexistent",
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONIOENCODING": "ascii",
        "TZ": "Asia/Kathmandu",
        "TERM": "dumb",
        "NO_COLOR": "1",
        "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"),
    }
    result = subprocess.run(
        [sys.executable, "-m", "kdcli.worker", str(run_dir)],
        env=environment(run_dir) | odd,
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr.decode()
    printed = (result.stdout + result.stderr).decode("ascii")
    assert "\x1b" not in printed
    assert "step 4/4" in printed
    assert "Error" not in printed
    assert not (tmp_path / "extensions").exists(), "nothing was compiled"
    assert runs.state(run_dir)["time"].endswith("+00:00")
    assert all(line["time"].endswith("+00:00") for line in runs.metrics.read(run_dir))
    assert set(re.findall(r"^\S{20}", (run_dir / "kdcli.log").read_text(), re.M))


def test_nothing_is_printed_that_tells_a_user_nothing(tmp_path):
    """One process and two: what appears is ours."""
    run_dir = runs.write_run(tmp_path)
    with launched(run_dir, "processes=2") as child:
        out, err = child.communicate(timeout=90)
    assert [line for line in err.splitlines() if not line.startswith(("data: ", "student: ", "waiting for"))] == []
    assert [line.split(":")[0] for line in out.splitlines() if line] == ["student", "next"]
