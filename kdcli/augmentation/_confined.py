"""Runs one Python program confined: `_sandbox` calls `main` in an interpreter of its own.

Descriptor JOB holds what to do (marshal), REPLY is told which layers hold, or why nothing was run, and how the program
ended. Layers: `namespaces` (no network, an own tree of processes, a root of read-only libraries and a folder in
memory), `landlock` (the same of files, kept by another part of the kernel), `seccomp` (the calls of _syscalls),
`account` (a user id of its own, where we are root). Only the standard library is imported, nothing of ours.
"""

from __future__ import annotations

# The module around _signal imports enum and re, which takes longer than all of the others together.
import _signal as signal  # pyright: ignore[reportMissingImports]
import ctypes
import marshal
import os
import resource
import struct
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import FrameType
    from typing import Any

MAX_THREADS = 32
FILES, FILE_BYTES, FOLDER_BYTES = 64, 16 << 20, 32 << 20
NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 8, 4096, 16384, 1 << 18
ATTRIBUTE_RDONLY_NOSUID, AT_FDCWD, AT_RECURSIVE, MNT_DETACH = 3, -100, 0x8000, 2
SET_PDEATHSIG, SET_NO_NEW_PRIVS, SET_SECCOMP, SET_DUMPABLE = 1, 38, 22, 4
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446
READ_FILE_AND_FOLDER, READ_AND_WRITE_FILE = 4 | 8, 2 | 4
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")
LIBRARIES = ("/usr/lib", "/usr/lib64", "/usr/local/lib", "/lib", "/lib64", "/nix/store", "/usr/share/zoneinfo")
HOME, PROGRAM = "/box", "program.py"

libc = ctypes.CDLL(None, use_errno=True)


class Missing(Exception):
    """A layer that the kernel does not give us, or a set without which nothing runs."""


def main() -> None:
    job_file, reply = int(sys.argv[1]), int(sys.argv[2])
    sys.path.remove(os.path.dirname(__file__))
    with open(job_file, "rb") as file:
        job: dict[str, Any] = marshal.loads(file.read())
    readable = _readable([*job["libraries"], *job["packages"]])
    sys.path += job["packages"]
    allowed: set[str] = set(job["layers"])
    job["number"] = os.getpid()
    held: list[str] = []
    notes: list[str] = []

    def attempt(layer: str, act: Any, *arguments: Any) -> None:
        """Put a layer on, where it is to be had."""
        if layer not in allowed:
            return
        try:
            act(*arguments)
            held.append(layer)
        except (Missing, OSError) as error:
            notes.append(f"{layer}: {error}")

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    attempt("namespaces", _leave, job)
    _call("prctl", SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # who asked for the program is gone: so is it
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # held back until somebody can act on it
    if (program := os.fork()) > 0:
        _wait(program, reply)
    try:
        if "namespaces" in held:
            _enter_root(job["folder"], readable, job["numbers"])  # half of it is none: this raises to the caller
        else:
            os.chdir(job["folder"])
        attempt("account", _drop_account, job, "namespaces" in held, readable)
        _call("prctl", SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        _drop_capabilities()
        _call("prctl", SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        attempt("landlock", _landlock, readable, ".")
        with open(PROGRAM, "w", encoding="utf-8", errors="replace") as file:
            file.write(job["source"])
        _limit(job, held)
        if job["filter"]:
            attempt("seccomp", _seccomp, job["filter"])
        if not {"namespaces", "seccomp"} & set(held):
            raise Missing(f"nothing keeps a program from the network ({'; '.join(notes) or 'no layer is allowed'})")
        if os.getuid() == 0 and "seccomp" not in held:
            raise Missing(f"nothing limits the processes of root ({'; '.join(notes) or 'no layer is allowed'})")
        if not {"namespaces", "landlock"} & set(held):
            raise Missing(f"nothing keeps a program from our files ({'; '.join(notes) or 'no layer is allowed'})")
    except (Missing, OSError) as error:
        os.write(reply, f"refused {error}\n".encode())
        os._exit(1)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    os.write(reply, f"ready {' '.join(held)}\n".encode())
    os.close(reply)
    _run(job["source"])


def _run(source: str) -> None:
    """The program as __main__; its traceback without our frames."""
    module = type(sys)("__main__")
    module.__dict__["__file__"] = PROGRAM
    sys.modules["__main__"] = module
    sys.argv = [PROGRAM]
    os.environ.clear()
    os.environ.update(HOME=os.getcwd(), TMPDIR=os.getcwd(), PATH="/nowhere", LC_CTYPE="C.UTF-8")
    os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")  # or numpy reserves more than a small limit
    try:
        exec(compile(source, PROGRAM, "exec"), module.__dict__)
    except SystemExit:
        raise
    except BaseException as error:
        trace = error.__traceback__
        while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
            trace = trace.tb_next
        sys.__excepthook__(type(error), error.with_traceback(trace), trace)
        sys.exit(1)


def _wait(program: int, reply: int) -> None:
    """What the first process does: wait, tell how the program ended, and end it where it is told to (SIGTERM). Nobody
    else reaps it, so that its number stays its own."""

    def end(signal_number: int, frame: FrameType | None) -> None:
        os.kill(program, signal.SIGKILL)

    signal.signal(signal.SIGTERM, end)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    for descriptor in (0, 1, 2):
        os.close(descriptor)
    _, status = os.waitpid(program, 0)
    os.write(reply, f"ended {os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


def _leave(job: dict[str, Any]) -> None:
    """Out of the machine's network, mounts and processes; without privileges by way of a user namespace."""
    if not job["numbers"]:
        raise Missing("unknown architecture")
    ids = os.getuid(), os.getgid()
    kinds = NEWNS | NEWUTS | NEWIPC | NEWPID | NEWNET
    if libc.unshare(kinds) != 0:
        _call("unshare", NEWUSER | kinds)
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{ids[0]} {ids[0]} 1"),
            ("gid_map", f"{ids[1]} {ids[1]} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    _call("mount", None, b"/", None, MS_REC | MS_PRIVATE, None)  # fails where a user namespace gives no rights


def _enter_root(folder: str, readable: Iterable[str], numbers: dict[str, int]) -> None:
    """A root with `readable` (read-only), a few devices and HOME, a folder in memory; the old root is gone."""
    _call("mount", b"none", folder.encode(), b"tmpfs", MS_NOSUID, b"size=1m,mode=755")
    for path in readable:
        inside = folder + path
        os.makedirs(os.path.dirname(inside), exist_ok=True)
        if os.path.islink(path):
            os.symlink(os.readlink(path), inside)
        else:
            _bind(path, inside)
            attributes = struct.pack("QQQQ", ATTRIBUTE_RDONLY_NOSUID, 0, 0, 0)
            _syscall(numbers["mount_setattr"], AT_FDCWD, inside.encode(), AT_RECURSIVE, attributes, len(attributes))
    os.makedirs(f"{folder}/dev")
    for device in DEVICES:
        _bind(device, folder + device)
    os.mkdir(folder + HOME)
    if not os.path.exists(f"{folder}/tmp"):  # it is there where the interpreter lies in it
        os.symlink(HOME, f"{folder}/tmp")
    size = f"size={FOLDER_BYTES},mode=700".encode()
    _call("mount", b"none", (folder + HOME).encode(), b"tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, size)
    attributes = struct.pack("QQQQ", ATTRIBUTE_RDONLY_NOSUID, 0, 0, 0)
    _syscall(numbers["mount_setattr"], AT_FDCWD, folder.encode(), 0, attributes, len(attributes))
    os.chdir(folder)
    _syscall(numbers["pivot_root"], b".", b".")
    _call("umount2", b".", MNT_DETACH)
    os.chdir(HOME)


def _bind(path: str, inside: str) -> None:
    if os.path.isdir(path):
        os.makedirs(inside, exist_ok=True)
    else:
        os.close(os.open(inside, os.O_CREAT | os.O_WRONLY))
    _call("mount", path.encode(), inside.encode(), None, MS_BIND | MS_REC, None)


def _drop_account(job: dict[str, Any], own_root: bool, readable: Iterable[str]) -> None:
    """From root to a user id that nobody has: 2**30 + a process number; so limits of processes hold, and files of
    others are theirs. Not where the interpreter's libraries could then not be read."""
    if os.getuid() != 0:
        raise Missing("not root")
    if not own_root and not all(_for_all(path) for path in readable):
        raise Missing("only root may read the libraries")
    account = (1 << 30) + job["number"]
    os.chown(".", account, account)
    os.setgroups([])
    os.setresgid(account, account, account)
    os.setresuid(account, account, account)


def _for_all(path: str) -> bool:
    """Whether everybody may go down to `path`."""
    parts = os.path.realpath(path).split("/")
    return all(os.stat("/".join(parts[:n]) or "/").st_mode & 5 == 5 for n in range(1, len(parts) + 1))


def _drop_capabilities() -> None:
    header, none = struct.pack("Ii", 0x20080522, 0), bytes(24)
    _call("capset", header, none)
    _call("prctl", SET_DUMPABLE, 0, 0, 0, 0)


def _landlock(readable: Iterable[str], home: str) -> None:
    """Files: `readable` to read, `home` to write; with newer kernels no connection, and no signal to others either."""
    version = libc.syscall(LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1)
    if version < 1:
        raise Missing("this kernel has none")
    rights = (1 << 13) - 1
    for since, right in ((2, 13), (3, 14), (5, 15)):  # to move between folders, to truncate, to control devices
        rights |= (version >= since) << right
    rules = struct.pack("QQQ", rights, 3, 3)[: 8 if version < 4 else 16 if version < 6 else 24]
    ruleset = _syscall(LANDLOCK_CREATE, rules, len(rules), 0)
    granted = [(path, READ_FILE_AND_FOLDER) for path in readable]
    granted += [(path, READ_AND_WRITE_FILE) for path in DEVICES] + [(home, rights & ~1)]
    for path, right in granted:
        descriptor = os.open(path, os.O_PATH)
        if not os.path.isdir(path):
            right &= READ_AND_WRITE_FILE
        _syscall(LANDLOCK_ADD, ruleset, 1, struct.pack("=Qi", right, descriptor), 0)
        os.close(descriptor)
    _syscall(LANDLOCK_RESTRICT, ruleset, 0)
    os.close(ruleset)


def _seccomp(program: bytes) -> None:
    held = ctypes.create_string_buffer(program, len(program))
    pointer = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(held))
    _call("prctl", SET_SECCOMP, 2, pointer, 0, 0)


def _limit(job: dict[str, Any], held: Iterable[str]) -> None:
    counted = bool({"namespaces", "account"} & set(held))  # else the user's other processes would count as well
    for kind, amount in (
        (resource.RLIMIT_FSIZE, FILE_BYTES),
        (resource.RLIMIT_NOFILE, FILES),
        (resource.RLIMIT_NPROC, MAX_THREADS if counted else resource.RLIM_INFINITY),
        (resource.RLIMIT_CPU, job["cpu_seconds"]),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
        (resource.RLIMIT_AS, job["memory"]),
    ):
        hard = resource.getrlimit(kind)[1]
        if hard != resource.RLIM_INFINITY:
            amount = hard if amount == resource.RLIM_INFINITY else min(amount, hard)
        resource.setrlimit(kind, (amount, amount))


def _readable(libraries: Iterable[str]) -> list[str]:
    """What an interpreter reads to import, without what lies in another of these."""
    found: list[str] = []
    wanted = {*libraries, *sys.path, *LIBRARIES, "/etc/ld.so.cache", "/etc/localtime"}
    wanted |= {os.path.realpath(path) for path in wanted if os.path.islink(path)}
    for path in sorted(wanted, key=lambda path: (len(path), path)):
        if os.path.exists(path) and not any(path == one or path.startswith(one + "/") for one in found):
            found.append(path)
    return found


def _call(name: str, *arguments: Any) -> int:
    """A function of the C library; raises OSError with its name."""
    result = getattr(libc, name)(*(ctypes.c_ulong(a) if isinstance(a, int) else a for a in arguments))
    if result == -1:
        raise OSError(f"{name}: {os.strerror(ctypes.get_errno())}")
    return result


def _syscall(number: int, *arguments: Any) -> int:
    result = libc.syscall(number, *(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments))
    if result == -1:
        raise OSError(f"system call {number}: {os.strerror(ctypes.get_errno())}")
    return result
