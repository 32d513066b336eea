"""Runs Python that a model wrote: an interpreter of its own, without network, keys or our files, within limits."""

from __future__ import annotations

import marshal
import os
import re
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, TypeVar

from kdcli.augmentation._syscalls import numbers, seccomp_filter
from kdcli.errors import ConfigError, KDError

T = TypeVar("T")
R = TypeVar("R")

LAYERS = ("namespaces", "account", "landlock", "seccomp")
START = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import _confined; _confined.main()"
MAX_OUTPUT = 64 << 10  # bytes of each stream; a program that writes more is ended
SETUP_SECONDS = 60.0  # to start an interpreter, on a machine that is busy
ADDRESS = re.compile(r"(?<= at )0x[0-9a-fA-F]+")  # <object at 0x7f…>: another one every time
RAISED = re.compile(r"([A-Za-z_][\w.]*)(?::|$)")


@dataclass(frozen=True, kw_only=True)
class Ran:
    """What a program wrote and how it ended. Addresses of objects are 0x0, the folder it ran in is /box."""

    output: str  # of standard output, the first MAX_OUTPUT bytes
    error: str  # of standard error: the traceback
    ok: bool  # it came to its end with exit code 0
    why: str  # a short reason to count by, such as "raised ZeroDivisionError" or "out of time"; empty where ok


def run_python(
    source: str, *, stdin: str = "", seconds: float = 5.0, memory_mib: int = 512, packages: bool = False
) -> Ran:
    """Run `source` as a program: the standard library alone (with `packages` also what is installed beside kdcli, such
    as numpy), an empty environment, an empty folder that goes with it, `seconds` of time (and of the processor's at
    most two more), `memory_mib` of address space, and no processes, sockets or signals to others. Layers are put on as
    the kernel has them (`layers`).

    Raises ConfigError where the machine cannot keep a program from the network and from our files: nothing is run
    then, and no setting makes it run. Raises KDError where no interpreter could be started.
    """
    return _run(source, stdin, seconds, memory_mib, LAYERS, packages)[0]


def layers() -> list[str]:
    """The layers that hold on this machine, of LAYERS. Raises ConfigError like `run_python`."""
    return _run("", "", 5.0, 512, LAYERS)[1]


def in_order(things: Iterable[T], act: Callable[[T], R], *, ahead: int = 32) -> Iterator[tuple[T, R]]:
    """`act` of each thing, as many at once as there are processors, in the order of the things."""
    source = iter(things)
    with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)))) as pool:
        while block := list(islice(source, ahead)):
            yield from zip(block, pool.map(act, block), strict=True)


def _run(
    source: str, stdin: str, seconds: float, memory_mib: int, allowed: Iterable[str], packages: bool = False
) -> tuple[Ran, list[str]]:
    if not sys.platform.startswith("linux"):
        raise ConfigError(
            f"programs of models run on Linux alone, whose kernel keeps them from the network; this is {sys.platform}"
        )
    from kdcli.augmentation import _confined  # noqa: F401  # so that it is compiled, once, when programs import it

    folder = tempfile.mkdtemp(prefix="kdcli-program-")
    try:
        job = {
            "source": source,
            "folder": folder,
            "layers": list(allowed),
            "libraries": [f"{sys.base_prefix}/lib", f"{sys.base_prefix}/lib64"],
            "packages": _installed() if packages else [],
            "cpu_seconds": int(seconds) + 2,
            "memory": memory_mib << 20,
            "filter": seccomp_filter(),
            "numbers": numbers(),
        }
        return _Program(job, stdin, seconds).result()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _installed() -> list[str]:
    """Folders of installed packages."""
    return [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages") and Path(path).is_dir()]


class _Program:
    """One program from its start to its end. The process that we start waits for the program, which is its child."""

    def __init__(self, job: dict[str, object], stdin: str, seconds: float) -> None:
        self.folder, self.seconds = str(job["folder"]), seconds
        self.written = {"output": bytearray(), "error": bytearray(), "reply": bytearray()}
        reply, theirs = os.pipe()
        self.reply = os.fdopen(reply, "rb", buffering=0)
        try:
            with _memory(marshal.dumps(job)) as told, _memory(stdin.encode("utf-8", "replace")) as given:
                self.process = subprocess.Popen(
                    [sys.executable, "-S", "-s", "-P", "-B", "-X", "utf8", "-c", START, str(told), str(theirs)],
                    stdin=given,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    env={"PYTHONHASHSEED": "0"},  # sets in the same order every time
                    cwd="/",
                    pass_fds=(told, theirs),
                    start_new_session=True,
                )
        finally:
            os.close(theirs)

    def result(self) -> tuple[Ran, list[str]]:
        """What the program did, and the layers that held, once no process of it is left."""
        try:
            stopped = self._follow()
        finally:
            self._end()
        told = self.written["reply"].decode()
        if told.startswith("refused"):
            raise ConfigError(
                f"programs of models are not run on this machine: {told.splitlines()[0].removeprefix('refused ')}; "
                "use a kernel with Landlock (5.13 or newer), allow user namespaces, or leave out what runs them"
            )
        if not told.startswith("ready"):
            reason = " ".join(self.written["error"].decode(errors="replace").split())[-300:]
            raise KDError(f"no interpreter could be started for a program of a model: {stopped or reason or 'it died'}")
        ready, _, ended = told.partition("\n")
        code = int(ended.split()[1]) if ended.startswith("ended") else -signal.SIGKILL
        output, error = self._text("output"), self._text("error")
        why = stopped or _reason(code, error)
        return Ran(output=output, error=error, ok=not why, why=why), ready.split()[1:]

    def _follow(self) -> str:
        """Read until the program is over; else why it must end."""
        deadline, ready = time.monotonic() + SETUP_SECONDS, False
        with selectors.DefaultSelector() as selector:
            for name, stream in self._streams().items():
                selector.register(stream, selectors.EVENT_READ, name)
            while selector.get_map():
                left = deadline - time.monotonic()
                if left <= 0:
                    return "out of time"
                for key, _ in selector.select(left):
                    chunk = os.read(key.fd, 1 << 16)
                    if not chunk:
                        selector.unregister(key.fileobj)
                    held = self.written[key.data]
                    held += chunk
                    if key.data != "reply" and len(held) > MAX_OUTPUT:
                        return "too much output"
                    if not ready and self.written["reply"].startswith(b"ready"):
                        deadline, ready = time.monotonic() + self.seconds, True
        return ""

    def _end(self) -> None:
        """Nothing of the program is left: its parent ends and reaps it, and we reap the parent and read the rest."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(SETUP_SECONDS)
            finally:
                if self.process.poll() is None:
                    os.killpg(self.process.pid, signal.SIGKILL)
                    self.process.wait()
        for name, stream in self._streams().items():
            with stream:
                os.set_blocking(stream.fileno(), False)
                while len(self.written[name]) <= MAX_OUTPUT and (chunk := _read(stream)):
                    self.written[name] += chunk

    def _streams(self) -> dict[str, IO[bytes]]:
        assert self.process.stdout is not None and self.process.stderr is not None
        return {"output": self.process.stdout, "error": self.process.stderr, "reply": self.reply}

    def _text(self, name: str) -> str:
        text = self.written[name][:MAX_OUTPUT].decode("utf-8", "replace").replace("\0", "\ufffd")
        return ADDRESS.sub("0x0", text.replace(self.folder, "/box").replace(f"{sys.base_prefix}/lib", "/lib"))


def _read(stream: IO[bytes]) -> bytes:
    try:
        return os.read(stream.fileno(), 1 << 16)
    except BlockingIOError:
        return b""


def _reason(code: int, error: str) -> str:
    """Why a program ended as it did: its exit code, minus the number of a signal, and its last words."""
    if code == 0:
        return ""
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    lines = error.rstrip().splitlines()
    found = RAISED.match(lines[-1]) if code == 1 and lines else None
    if found is None:
        return f"exit code {code}"
    return "out of memory" if found[1] == "MemoryError" else f"raised {found[1]}"


@contextmanager
def _memory(content: bytes) -> Iterator[int]:
    """A descriptor of a file in memory, at its beginning."""
    descriptor = os.memfd_create("kdcli", os.MFD_CLOEXEC)
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(content)
        os.lseek(descriptor, 0, os.SEEK_SET)
        yield descriptor
    finally:
        os.close(descriptor)
