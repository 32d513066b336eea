"""Programs of models: what they cannot do, and what becomes of those that try. Nothing here takes a second."""

import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from kdcli.augmentation import _sandbox
from kdcli.augmentation._sandbox import MAX_OUTPUT, in_order, run_python
from kdcli.errors import ConfigError

EACH = [("namespaces", "account", "landlock", "seccomp"), ("namespaces", "account"), ("account", "landlock", "seccomp")]


@pytest.fixture(scope="module", params=EACH, ids="+".join)
def ran(request):
    """`run_python` with some of the layers, as on a machine that lacks the others."""

    def ran(source, *, stdin="", seconds=5.0, memory_mib=256):
        return _sandbox._run(source, stdin, seconds, memory_mib, request.param)[0]

    try:
        ran("")
    except ConfigError as error:
        pytest.skip(str(error))
    return ran


def processes():
    """Numbers of all processes below this one."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(entry.name)] = int(entry.joinpath("stat").read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
    below = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in below} - below:
        below |= more
    return below - {os.getpid()}


def test_a_program_reads_its_input_and_writes_its_output():
    ran = run_python("import sys\nprint(int(input()) ** 2)\nprint('é', file=sys.stderr)", stdin="12\n")
    assert (ran.output, ran.error, ran.ok, ran.why) == ("144\n", "é\n", True, "")


def test_installed_packages_are_there_for_who_wants_them():
    source = "import numpy, sympy\nprint(numpy.arange(4) @ numpy.arange(4), sympy.sqrt(8))"
    assert run_python(source).why == "raised ModuleNotFoundError"
    assert run_python(source, packages=True).output == "14 2*sqrt(2)\n"


def test_this_machine_has_a_layer_that_shuts_the_network():
    assert {"namespaces", "seccomp"} & set(_sandbox.layers())


def test_how_a_program_ended_is_said_in_words_to_count_by():
    assert run_python("def f():\n    return 1 / 0\nf()").why == "raised ZeroDivisionError"
    assert run_python("raise SystemExit(3)").why == "exit code 3"
    assert run_python("import ctypes; ctypes.string_at(0)").why == "ended by SIGSEGV"
    assert run_python("if:").why == "raised SyntaxError"


def test_a_traceback_shows_the_program_alone_and_is_the_same_every_time():
    source = "class A: pass\ndef f(x):\n    raise ValueError(f'{x} {set(\"abcdef\")}')\nf(A())"
    first, second = run_python(source), run_python(source)
    assert first == second
    assert first.error.splitlines()[1] == '  File "program.py", line 4, in <module>'
    assert "_confined" not in first.error and "at 0x0>" in first.error


def test_the_network_is_shut(ran):
    """A server of ours on loopback, an address elsewhere, an abstract socket and a pair of datagrams."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        connect = f"import socket; socket.create_connection(('127.0.0.1', {port}), 0.2)"
        assert not ran(connect).ok
        server.settimeout(0.0)
        with pytest.raises(BlockingIOError):
            server.accept()
    assert not ran("import socket; socket.create_connection(('192.0.2.1', 80), 0.2)").ok
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("\0kdcli-test-of-the-sandbox")
        server.listen()
        assert not ran("import socket; socket.socket(socket.AF_UNIX).connect('\\0kdcli-test-of-the-sandbox')").ok


def test_nothing_of_our_environment_is_seen(ran, monkeypatch):
    monkeypatch.setenv("SECRET_KEY", "sk-1234567890")
    source = """
import glob, os
seen = str(dict(os.environ))
for name in glob.glob('/proc/*/environ') + [f'/proc/{n}/environ' for n in ('self', os.getppid(), %d)]:
    try:
        seen += open(name, 'rb').read().decode('latin1')
    except OSError:
        pass
print('sk-' in seen, 'SECRET' in seen)
"""
    assert ran(source % os.getpid()).output == "False False\n"


def test_files_of_ours_are_neither_read_nor_written(ran, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    os.chmod(tmp_path, 0o777)
    os.chmod(tmp_path / "mine.txt", 0o666)
    for act in (
        "open({!r})",
        "open({!r}, 'w')",
        "__import__('os').unlink({!r})",
        "__import__('os').listdir({!r} + '/..')",
    ):
        assert not ran(act.format(str(tmp_path / "mine.txt"))).ok
    assert not ran(f"open({str(tmp_path / 'new.txt')!r}, 'w')").ok
    assert not ran("import os; open(os.path.dirname(os.__file__) + '/new.py', 'w')").ok
    assert [f.name for f in tmp_path.iterdir()] == ["mine.txt"] and (tmp_path / "mine.txt").read_text() == "mine"


def test_its_folder_is_empty_writable_and_gone_afterwards(ran, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    source = "import os, tempfile\nprint(os.listdir())\nopen('a.txt', 'w').write('b')\nprint(open('a.txt').read())\n"
    source += "with tempfile.NamedTemporaryFile('w') as file: file.write('c')\nprint(os.getcwd())"
    assert ran(source).output == "['program.py']\nb\n/box\n"
    assert not list(tmp_path.iterdir())


def test_an_endless_loop_ends_with_its_time():
    began = time.monotonic()
    assert run_python("while True: pass", seconds=0.2).why == "out of time"
    assert time.monotonic() - began < 20


def test_sleeping_and_ignoring_signals_does_not_help():
    source = "import signal, time\nfor n in (1, 2, 15): signal.signal(n, signal.SIG_IGN)\n"
    source += "print('x', flush=True)\ntime.sleep(60)"
    result = run_python(source, seconds=1.0)
    assert (result.output, result.why) == ("x\n", "out of time")


def test_memory_ends_at_its_limit(ran):
    assert ran("x = bytearray(1 << 30)").why == "out of memory"
    assert ran("x = []\nwhile True: x.append(bytearray(1 << 20))", memory_mib=128).why == "out of memory"


def test_a_flood_of_output_is_cut():
    result = run_python("while True: print('x' * (1 << 20))")
    assert result.why == "too much output" and result.output == "x" * MAX_OUTPUT


def test_the_disk_is_not_filled():
    result = run_python("with open('a', 'wb') as file:\n    for _ in range(64): file.write(bytes(1 << 20))")
    assert not result.ok


def test_a_fork_bomb_leaves_nothing():
    """With a filter there is no second process; without it (next test) there are few."""
    before = processes()
    result = run_python("import os\nwhile True: os.fork()")
    assert result.why == "raised PermissionError" and processes() <= before
    assert not run_python("import subprocess; subprocess.run(['/bin/true'])").ok
    assert not run_python("import multiprocessing as m; p = m.Process(target=print); p.start()").ok


def test_a_bomb_of_processes_is_bounded_and_killed_where_there_is_no_filter():
    source = """
import os, time
count = 0
try:
    while True:
        if os.fork() == 0:
            os.setsid()
            time.sleep(60)
        count += 1
except OSError:
    print(count, flush=True)
time.sleep(60)
"""
    before = processes()
    try:
        result = _sandbox._run(source, "", 2.0, 256, ("namespaces", "account"))[0]
    except ConfigError as error:
        pytest.skip(str(error))
    assert result.why == "out of time" and 0 < int(result.output) <= 32
    assert processes() <= before


def test_a_bomb_of_threads_is_bounded(ran):
    source = "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(60,), daemon=True).start()"
    assert ran(source, memory_mib=512).why == "raised RuntimeError"  # can't start new thread


def test_threads_and_asyncio_work(ran):
    source = """
import asyncio, threading
async def main():
    await asyncio.sleep(0.01)
    return await asyncio.to_thread(lambda: 7)
thread = threading.Thread(target=print, args=("thread",)); thread.start(); thread.join()
print(asyncio.run(main()))
"""
    assert ran(source).output == "thread\n7\n"


def test_it_cannot_signal_us(ran):
    source = "import os\nfor act, n in ((os.kill, {0}), (os.killpg, {1})):\n"
    source += "    try: act(n, 0), print('could')\n    except OSError: print('could not')"
    assert ran(source.format(os.getpid(), os.getpgrp())).output == "could not\n" * 2


def test_it_dies_with_who_asked_for_it():
    """A run that is killed leaves no program behind that goes on for the rest of its minute."""
    before = processes()
    code = "from kdcli.augmentation._sandbox import run_python; run_python('while True: pass', seconds=60)"
    with subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"}) as asked:
        until = time.monotonic() + 60
        while len(started := processes() - before) < 3 and time.monotonic() < until:
            time.sleep(0.02)
        assert len(started) >= 3
        asked.kill()
    while any(Path(f"/proc/{pid}").exists() for pid in started) and time.monotonic() < until:
        time.sleep(0.02)
    assert not any(Path(f"/proc/{pid}").exists() for pid in started)


def test_nothing_is_left_after_a_run():
    before = processes()  # living and dead
    run_python("print(1)")
    run_python("while True: pass", seconds=0.1)
    assert processes() <= before


def test_nothing_runs_where_the_network_cannot_be_shut():
    with pytest.raises(ConfigError, match="nothing keeps a program from the network"):
        _sandbox._run("print(1)", "", 1.0, 256, ("landlock",))
    with pytest.raises(ConfigError, match="nothing keeps a program from our files"):
        _sandbox._run("print(1)", "", 1.0, 256, ("seccomp",))


@pytest.mark.skipif(os.getuid() != 0, reason="the limit of processes does not hold for root alone")
def test_nothing_runs_where_root_could_start_processes_without_end():
    with pytest.raises(ConfigError, match="nothing limits the processes of root"):
        _sandbox._run("print(1)", "", 1.0, 256, ("namespaces", "landlock"))


def test_calls_that_reach_beyond_a_program_are_refused():
    """Also those that no part of the kernel but the filter would refuse to an unprivileged process."""
    source = """
import ctypes, errno, os
libc = ctypes.CDLL(None, use_errno=True)
calls = dict(ptrace=(0, 0, 0, 0), unshare=(0x10000000,), setns=(0, 0), fork=(), vfork=(), kill=(os.getpid(), 9),
             memfd_create=(b"a", 0), inotify_init=(), personality=(0,), socket=(1, 1, 0), setsid=(),
             process_vm_readv=(os.getpid(), 0, 0, 0, 0, 0), syscall=(425, 1, 0))  # io_uring_setup, past any filter
for name, given in calls.items():
    if getattr(libc, name)(*given) != -1 or ctypes.get_errno() not in (errno.EPERM, errno.ENOSYS):
        print(name, ctypes.get_errno())
try:
    os.execv("/bin/true", ["true"])
except PermissionError:
    pass
print("end")
"""
    assert _sandbox._run(source, "", 2.0, 256, ("landlock", "seccomp"))[0].output == "end\n"


def test_many_threads_may_run_programs_at_once_and_get_their_own():
    assert [ran.output for _, ran in in_order(range(6), lambda n: run_python(f"print({n})"))] == [
        f"{n}\n" for n in range(6)
    ]
    assert threading.active_count() < 10
