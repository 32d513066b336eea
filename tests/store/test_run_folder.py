"""What is written into a run folder: whole or not at all, by one run at a time, without secrets."""

import json
import logging
import math
import os
import subprocess
import sys

import pytest

from kdcli.errors import ConfigError
from kdcli.store import atomic, log, metrics, status
from kdcli.store.fault import fault
from kdcli.store.lock import RunLock


def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(tmp_path, monkeypatch):
    atomic.write_json(tmp_path / "a.json", {"old": 1})
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError):
        atomic.write_json(tmp_path / "a.json", {"new": 2})
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert json.loads((tmp_path / "a.json").read_text()) == {"old": 1}


def test_json_is_strict(tmp_path):
    atomic.write_json(tmp_path / "a.json", {"x": [math.nan, math.inf, 1.5], "path": tmp_path})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": [None, None, 1.5], "path": str(tmp_path)}


def test_metrics_are_cut_back_and_a_torn_line_is_tolerated(tmp_path):
    writer = metrics.MetricsLog(tmp_path)
    for step in range(4):
        writer.append(step, {"loss/total": step / 2})
    with open(writer.path, "a") as file:
        file.write('{"step": 4, "loss')
    assert [line["step"] for line in metrics.read(tmp_path)] == [0, 1, 2, 3]
    writer.cut(2)
    writer.append(3, {"loss/total": math.nan})
    assert [line["step"] for line in metrics.read(tmp_path)] == [0, 1, 2, 3]
    assert metrics.read(tmp_path)[3]["loss/total"] is None


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\noops\n{"step": 2}\n')
    with pytest.raises(ConfigError, match=r"metrics\.jsonl:2"):
        metrics.read(tmp_path)


def test_one_run_per_folder(tmp_path):
    with RunLock(tmp_path), pytest.raises(ConfigError, match=f"in use by process {os.getpid()}"):
        RunLock(tmp_path).__enter__()
    with RunLock(tmp_path):
        pass


def test_the_lock_of_a_killed_process_is_taken_over_with_a_note(tmp_path, caplog):
    code = (
        "import os, sys; from kdcli.store.lock import RunLock; RunLock(sys.argv[1]).__enter__(); "
        "os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    with caplog.at_level(logging.WARNING), RunLock(tmp_path):
        assert "taking over" in caplog.text
        assert "has ended" in caplog.text
    caplog.clear()
    with RunLock(tmp_path):
        assert not caplog.text


def test_status_of_an_empty_or_broken_folder_is_empty(tmp_path):
    assert status.read(tmp_path) == {}
    (tmp_path / "status.json").write_text("{")
    assert status.read(tmp_path) == {}
    status.write(tmp_path, "running", step=3, steps=9, resumable=False)
    assert status.read(tmp_path)["step"] == 3
    assert status.read(tmp_path)["time"].endswith("+00:00")


@pytest.mark.parametrize("where", ["p", "p:rank=1", "p:step=3", "p:rank=1:step=3"])
def test_a_fault_hits_its_point_rank_and_step_only(monkeypatch, where):
    monkeypatch.setenv("KDCLI_FAULT", f"{where}:raise")
    monkeypatch.delenv("KDCLI_TESTING", raising=False)
    assert not fault("p", rank=1, step=3), "ignored unless KDCLI_TESTING=1"
    monkeypatch.setenv("KDCLI_TESTING", "1")
    with pytest.raises(RuntimeError, match="injected"):
        fault("p", rank=1, step=3)
    assert not fault("q", rank=1, step=3)
    if "rank" in where:
        assert not fault("p", rank=0, step=3)
    if "step" in where:
        assert not fault("p", rank=1, step=4)


def test_the_other_faults(monkeypatch):
    monkeypatch.setenv("KDCLI_TESTING", "1")
    monkeypatch.setenv("KDCLI_FAULT", "a:enospc,b:nan,c:sleep=0.01")
    with pytest.raises(OSError) as error:
        fault("a")
    assert atomic.no_space(error.value, os.getcwd(), needed=2**20)
    assert fault("b") is True
    assert fault("c") is False
    monkeypatch.setenv("KDCLI_FAULT", "a:explode")
    with pytest.raises(ConfigError, match="explode"):
        fault("a")


def test_other_errors_are_no_disk_full():
    assert atomic.no_space(ValueError("x"), os.getcwd()) is None
    assert atomic.no_space(OSError(13, "Permission denied"), os.getcwd()) is None


def test_no_secret_reaches_the_log(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TEACHER_API_KEY", "very-secret-value")
    log.setup(tmp_path, rank=0)
    logger = logging.getLogger("kdcli.test")
    try:
        raise RuntimeError("refused very-secret-value")
    except RuntimeError:
        logger.exception("https://user:pass@host/ with hf_abcdefghijklmnopqrst and %s", "very-secret-value")
    written = (tmp_path / "kdcli.log").read_text() + capsys.readouterr().err
    assert "very-secret-value" not in written
    assert "hf_abc" not in written
    assert "user:pass" not in written
    assert "[rank 0] ERROR kdcli.test: https://***@host/" in written


def test_only_rank_0_speaks_but_every_rank_writes(tmp_path, capsys):
    log.setup(tmp_path, rank=1)
    logging.getLogger("kdcli.test").warning("from one")
    assert "from one" in (tmp_path / "kdcli.log").read_text()
    assert not capsys.readouterr().err


@pytest.fixture(autouse=True)
def _handlers_are_put_back():
    root = logging.getLogger()
    before = list(root.handlers), root.level
    yield
    for handler in [h for h in root.handlers if h not in before[0]]:
        root.removeHandler(handler)
        handler.close()
    root.setLevel(before[1])
    logging.captureWarnings(False)
